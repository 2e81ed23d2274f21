"""OpenVINO GenAI at work, run by the Python that has it.

openvino_engine.py --convert MODEL.gguf                    saves it beside the file as OpenVINO's
openvino_engine.py FOLDER THREADS SEED PROMPTxGENERATExBATCH...

The latter prints a line of JSON a shape, with the names of llama-batched-bench.
"""

import json
import random
import sys
import time

import numpy
import openvino
import openvino_genai


def scheduler():
    config = openvino_genai.SchedulerConfig()
    config.cache_size = 2  # GB
    config.max_num_batched_tokens = 4096  # 32 prompts of 128 in one step
    config.dynamic_split_fuse = True
    config.enable_prefix_caching = False
    return config


def run(pipeline, draw_id, prompt, generate, batch):
    """Seconds until each of `batch` requests has a token, and from there to the last token."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = generate
    config.ignore_eos = True
    config.do_sample = False
    handles = []
    for i in range(batch):
        ids = [[draw_id() for _ in range(prompt)]]
        handles.append(pipeline.add_request(i, openvino.Tensor(numpy.array(ids, numpy.int64)),
                                            config))
    began = time.perf_counter()
    while not all(handle.can_read() for handle in handles):
        pipeline.step()
    filled = time.perf_counter()
    while pipeline.has_non_finished_requests():
        pipeline.step()
    ended = time.perf_counter()
    drawn = [sum(len(output.generated_ids) for output in handle.read_all()) for handle in handles]
    if drawn != [generate] * batch:
        sys.exit(f"openvino: asked {batch} requests for {generate} tokens each, got {drawn}")
    return filled - began, ended - filled


def main(arguments):
    if arguments[0] == "--convert":
        openvino_genai.LLMPipeline(arguments[1], "CPU", scheduler_config=scheduler(),
                                   enable_save_ov_model=True)
        return
    folder, threads, seed, *shapes = arguments
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        folder, scheduler(), "CPU", {"INFERENCE_NUM_THREADS": int(threads)})
    vocabulary = len(pipeline.get_tokenizer().get_vocab())
    random_ids = random.Random(int(seed))

    def draw_id():
        return random_ids.randrange(vocabulary)

    for shape in shapes:
        prompt, generate, batch = map(int, shape.split("x"))
        # It makes its kernels when it first meets a shape.
        run(pipeline, draw_id, prompt, min(generate, 4), batch)
        t_pp, t_tg = run(pipeline, draw_id, prompt, generate, batch)
        # The first token comes with the prompt.
        print(json.dumps({"pp": prompt, "tg": generate, "pl": batch,
                          "speed_pp": batch * prompt / t_pp,
                          "speed_tg": batch * (generate - 1) / t_tg if generate > 1 else 0}),
              flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
