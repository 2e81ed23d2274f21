"""The pure parts of bench-peers: what is read from each engine, and what samples come to."""

import json
import unittest
import xml.etree.ElementTree

import cpu_watch
import figures
import picture

STAT = """cpu  1000 0 0 0 0 0 0 0 0 0
cpu0 10 1 20 1000 7 2 3 4 0 0
cpu1 100 0 0 500 0 0 0 0 0 0
cpu12 5000 0 0 0 0 0 0 0 0 0
intr 12345
"""


def line(prompt, generate, batch, prefill, decode):
    return json.dumps({"pp": prompt, "tg": generate, "pl": batch, "speed_pp": prefill,
                       "speed_tg": decode})


PEER_OUTPUT = "\n".join([
    "0.00.1 W llama_context: n_ctx is not divisible by n_seq_max", "",
    line(128, 128, 1, 500, 90), line(128, 128, 8, 600, 200), line(128, 128, 32, 550, 250),
    "noise", line(512, 1, 1, 450, 80)])


def samples(ours=1.0, llama=1.0, openvino=1.0):
    """One value a thing; OpenVINO neither serves nor starts here."""
    made = {}
    for engine, factor in ((figures.OURS, ours), (figures.LLAMA, llama),
                           (figures.OPENVINO, openvino)):
        values = {what: 100 * factor for what in figures.SPEEDS}
        if engine != figures.OPENVINO:
            values |= {figures.SERVE: 10 * factor, figures.COLD_START: 1 / factor}
        figures.merge(made, engine, values)
    return made


class PeersTest(unittest.TestCase):

    def test_reads_json_lines_among_others(self):
        speeds = figures.parse_lines(PEER_OUTPUT)
        self.assertEqual(set(speeds), set(figures.SPEEDS))
        self.assertEqual(speeds["decode_b8"], 200)
        self.assertEqual(speeds["prefill_p128_b32"], 550)
        # The one token after the long prompt is no decode speed.
        self.assertEqual(speeds["decode_b1"], 90)
        self.assertEqual(speeds["prefill_p512_b1"], 450)

    def test_a_shape_that_did_not_run_is_named(self):
        without = "\n".join(l for l in PEER_OUTPUT.splitlines() if '"pl": 32' not in l)
        with self.assertRaisesRegex(ValueError, "decode_b32, prefill_p128_b32"):
            figures.parse_lines(without)
        with self.assertRaisesRegex(ValueError, "prefill_p512_b1"):
            figures.parse_lines(PEER_OUTPUT.replace('"speed_pp": 450', '"speed_pp": 0.0'))

    def test_reads_our_bench(self):
        text = json.dumps({"machine": "m"} | {
            f"{key}_{part}": value
            for key in ("decode_p128_b1", "decode_p128_b8", "decode_p128_b32", "prefill_p128_b1",
                        "prefill_p128_b8", "prefill_p128_b32", "prefill_p512_b1")
            for part, value in (("tokens_per_s", len(key)), ("roofline_share", 0.5))})
        speeds, shares = figures.parse_bench(text)
        self.assertEqual(set(speeds), set(figures.SPEEDS))
        self.assertEqual(speeds["decode_b32"], len("decode_p128_b32"))
        self.assertEqual(set(shares.values()), {0.5})

    def test_a_stream_counts_by_its_last_message(self):
        stream = [b'data: {"content":"a","stop":false}\n', b"\n",
                  b'data: {"content":"","stop":true,"tokens_predicted":128}\n', b"\n"]
        self.assertEqual(figures.streamed_tokens(stream), 128)
        with self.assertRaisesRegex(ValueError, "ended before"):
            figures.streamed_tokens(stream[:2])
        with self.assertRaisesRegex(ValueError, "ended before"):
            figures.streamed_tokens([])
        with self.assertRaisesRegex(ValueError, "context"):
            figures.streamed_tokens([stream[0], b'error: {"message":"context is full"}\n'])

    def test_busy_counts_only_our_cores(self):
        self.assertEqual(cpu_watch.busy_ticks(STAT, {0}), 40)
        self.assertEqual(cpu_watch.busy_ticks(STAT, {0, 1}), 140)

    def test_others_are_what_neither_idled_nor_was_ours(self):
        self.assertAlmostEqual(figures.others_share(15, 10, 10, 2), 0.25)
        self.assertEqual(figures.others_share(9.9, 10, 10, 2), 0)  # ticks are coarse
        self.assertEqual(figures.others_share(50, 0, 10, 2), 1)

    def test_flags_are_those_with_kernels(self):
        self.assertEqual(cpu_watch.vector_flags("model name : x\nflags\t: sse avx2 avx512_vnni\n"),
                         ["avx2", "avx512_vnni"])

    def test_ratios_are_of_medians_to_the_better_peer(self):
        made = {figures.OURS: {"decode_b1": [300, 100, 200]},
                figures.LLAMA: {"decode_b1": [50, 1000, 40]},
                figures.OPENVINO: {"decode_b1": [80, 80, 80]}}
        self.assertEqual(figures.best_peer(made, "decode_b1"), (figures.OPENVINO, 80))
        self.assertEqual(figures.ratio(made, "decode_b1"), 2.5)

    def test_a_shorter_start_is_the_better(self):
        made = {figures.OURS: {figures.COLD_START: [0.2]},
                figures.LLAMA: {figures.COLD_START: [0.4]},
                figures.OPENVINO: {figures.COLD_START: [3.0]}}
        self.assertEqual(figures.ratio(made, figures.COLD_START), 0.5)

    def test_prefill_is_told_by_the_worst_shape(self):
        made = samples(ours=4, llama=2, openvino=1)
        made[figures.OPENVINO]["prefill_p128_b8"] = [800]
        roofline = {what: [0.7] for what in figures.SPEEDS} | {"prefill_p512_b1": [0.2, 0.4, 0.9]}
        flat = figures.flat(made, roofline, {})
        self.assertEqual(flat["prefill_vs_best"], 0.5)
        self.assertEqual(flat["decode_b8_vs_best"], 2)
        self.assertEqual(flat["roofline_prefill"], 0.4)
        self.assertEqual(flat["roofline_decode_b32"], 0.7)
        self.assertEqual(flat["serve_b32_vs_llamaserver"], 2)
        self.assertEqual(flat["cold_start_vs_llamacpp"], 0.5)
        self.assertNotIn("ppl_int8_rel", flat)
        self.assertTrue(all(isinstance(value, (int, float)) for value in flat.values()))

    def test_perplexity_is_told_as_the_difference(self):
        flat = figures.flat(samples(), {what: [1] for what in figures.SPEEDS},
                            {"f32": 20.0, "int8": 20.05, "int4": 19.9})
        self.assertAlmostEqual(flat["ppl_int8_rel"], 0.0025)
        self.assertAlmostEqual(flat["ppl_int4_rel"], -0.005)

    def test_the_table_has_a_row_a_thing_and_gaps_where_nothing_ran(self):
        made = samples(ours=3)
        figures.merge(made, figures.OURS, {"decode_b1": 500})
        table = figures.table(made, {"decode_b1": [0.5]}).splitlines()
        self.assertEqual(len(table), 2 + len(figures.ROWS))
        self.assertEqual(table[2], "| decode, batch 1, 128 + 128, tokens/s | 400 (300 to 500) | "
                                   "100 | 100 | **4.00x** | 50 % |")
        self.assertIn("| 0.33 | 1.00 |  | **0.33x** |  |", table[-1])

    def test_the_picture_is_an_svg_with_a_bar_a_speed(self):
        flat = figures.flat(samples(ours=2), {what: [1] for what in figures.SPEEDS}, {})
        svg = xml.etree.ElementTree.fromstring(
            picture.draw({"machine": "a <b> & c", "turns": 3, **flat}))
        bars = [rect for rect in svg.iter("{http://www.w3.org/2000/svg}rect")
                if rect.get("width") == str(picture.BAR)]
        self.assertEqual(len(bars), 3 * len(figures.SPEEDS) + 2)


if __name__ == "__main__":
    unittest.main()
