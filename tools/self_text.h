// Text that a model makes up by itself: calibration for whoever has no text like the traffic.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/model_executor.h"
#include "engine/model/text/tokenizer.h"

namespace espalier {

// `count` texts of `length` tokens, of short pieces, `batch` at a time; the pool must hold so many.
// Of every four pieces three go on from an opening as text of some kind may have, prose, code, data
// or talk, and one from a random token: variety is what counts, and a model left to itself soon
// writes nothing but prose, or noise. Pieces are of 64 tokens at temperature 1; longer, and nearly
// as the model knows them, of licences and their like, and longer of prose as corpora have it. The
// same seed draws the same texts. Stop tokens are drawn on over. Calls progress(done, total) in
// tokens; when it returns false, Cancelled.
absl::StatusOr<std::vector<std::vector<int32_t>>> MakeUpTexts(
    ModelExecutor* executor, const Tokenizer& tokenizer, int count, int length, int batch,
    uint64_t seed, const std::function<bool(int64_t done, int64_t total)>& progress);

}  // namespace espalier
