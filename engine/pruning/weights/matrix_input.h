// Where a layer's matrices meet what comes to them.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace espalier {

// q, k and v share their input, so do gate and up.
enum class MatrixInput : uint8_t { kQkv, kO, kGateUp, kDown };
inline constexpr std::array<std::string_view, 4> kMatrixInputNames = {"attn_qkv", "attn_output",
                                                                      "ffn_gate_up", "ffn_down"};

}  // namespace espalier
