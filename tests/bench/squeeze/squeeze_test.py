"""The pure parts of bench-squeeze: which rungs are fixed, and what cells come to."""

import unittest
import xml.etree.ElementTree

import llama_line
import squeeze_picture
import summary
from summary import DQN, FULL, LADDER, LLAMA, REFUSING

LADDER_TEXT = """espalier-ladder 1
# a comment
model layers=4 heads=2 channels=100
rung 0 loss=0 prefill_us=5 kv_bytes=64
rung 1 loss=0.05 kv_bytes=32 kv=int4
rung 2 loss=0.1 kv_bytes=32 kv=int4 channels=100,90*3
rung 3 loss=0.2 kv_bytes=32 kv=int4 channels=100,70*3
rung 4 loss=0.4 kv_bytes=32 kv=int4 channels=100,50*3
"""


def report(good, loss, refused=0):
    return {"goodput": good, "loss": loss, "refused": refused, "calls": 60}


CELLS = {
    (0, 0.5): {FULL: report(2, 0), "fixed_20": report(2, 0.2), "fixed_40": report(2, 0.4),
               LADDER: report(2, 0), DQN: report(1.8, 0)},
    (0.7, 2): {FULL: report(0, 0), REFUSING: report(2.5, 0), "fixed_20": report(1, 0.2),
               "fixed_40": report(4, 0.4), LADDER: report(5, 0.3, 9) | {"simulated": 5.5},
               DQN: report(5, 0.2), LLAMA: report(0.5, 0)},
}


class SummaryTest(unittest.TestCase):
    def test_fixed_rungs_are_found_by_what_they_leave_out(self):
        token_bytes, left_out = summary.ladder_of(LADDER_TEXT)
        self.assertEqual(token_bytes, 64)
        self.assertEqual([round(each, 3) for each in left_out], [0, 0, 0.075, 0.225, 0.375])
        self.assertEqual([summary.rung_of(left_out, share) for share in (0.2, 0.4)], [3, 4])

    def test_ratios(self):
        ratios = summary.ratios(CELLS, lambda load: 5 * load)
        self.assertEqual(ratios["goodput_vs_dense"], 50)  # none counts as one call in 10 s
        self.assertEqual(ratios["goodput_vs_best_fixed"], 1)
        self.assertEqual(ratios["loss_vs_best_fixed"], 0.3 / (0.2 + 0.4))
        self.assertEqual(ratios["goodput_vs_llamaserver"], 10)
        self.assertEqual(ratios["goodput_vs_refusing"], 2)
        self.assertEqual(ratios["dqn_goodput_vs_ladder"], 0.9)
        self.assertAlmostEqual(ratios["simulator_error"], 0.1)

    def test_cells_are_read_back_from_figures(self):
        self.assertEqual(summary.cells_of(summary.flat(CELLS) | {"goodput_vs_dense": 2}), CELLS)

    def test_table(self):
        table = summary.markdown(CELLS).splitlines()
        self.assertEqual(len({line.count("|") for line in table}), 1)
        self.assertIn("| 70 % | 2x | 0.00 | 2.50 | 1.00 (0.200) |", table[3])
        self.assertIn("**5.00** (0.300), 9 of 60 refused", table[3])

    def test_picture_is_xml_with_every_line(self):
        root = xml.etree.ElementTree.fromstring(squeeze_picture.draw(CELLS, "a <machine>"))
        lines = [each for each in root if each.tag.endswith("polyline")]
        self.assertEqual(len(lines), 5 + 7)


class LlamaTest(unittest.TestCase):
    def test_slots_hold_whole_calls_in_the_memory_there_is(self):
        slots = llama_line.options("slots", 2611, 32, 256)
        self.assertEqual(slots[slots.index("-np") + 1], 10)
        self.assertEqual(slots[slots.index("-c") + 1], 2560)
        self.assertEqual(llama_line.options("slots", 2611, 32, 257)[-3:], [5, "-c", 2560])
        self.assertEqual(llama_line.options("unified", 2611, 32, 256)[-3:], [32, "-c", 2560])


if __name__ == "__main__":
    unittest.main()
