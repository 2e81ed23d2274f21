// A ladder as text: what calibration writes, the server reads and people look at.
//
//   espalier-ladder 1
//   # Comments and empty lines anywhere after the first.
//   model layers=30 heads=9 channels=1536
//   rung 0 loss=0 prefill_us=480 decode_us=3300 kv_bytes=11520
//   rung 1 loss=0.05 prefill_us=480 decode_us=2900 kv_bytes=11520 decode.channels=1536*3,1344*27
//   rung 2 loss=0.3 kv_bytes=5184 kv=int4 heads=9*20,0*3,9*7 decode.channels=1536*3,896*27
//
// Counts are of the kept, layer by layer, runs of equal ones as COUNT*LAYERS. `heads` and
// `channels` hold for prefill and decode rows, with `prefill.` or `decode.` before them for one of
// the two; what is not told is kept whole. `kv=int4`: K and V in four bits. Rungs are numbered from
// 0, which keeps everything; each is nested in the one before.
#pragma once

#include <string>
#include <string_view>

#include "policy/ladder.h"

namespace espalier {

// More than any model of today has, and little enough that a file cannot ask for much memory.
inline constexpr int kMostLadderLayers = 1024;
inline constexpr int kMostLadderWidth = 1 << 20;  // heads or channels of a layer

// False, with the line and what is wrong with it in *error, if the text is no ladder. *ladder is
// then as it was.
bool ParseLadder(std::string_view text, Ladder* ladder, std::string* error);

// What ParseLadder reads back to an equal ladder. `comment` becomes lines behind the first.
std::string FormatLadder(const Ladder& ladder, std::string_view comment);

}  // namespace espalier
