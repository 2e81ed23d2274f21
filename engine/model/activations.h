// Every activation buffer of a forward pass in one place, sized once for the largest step.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#include "engine/model_config.h"
#include "kernels/tensor.h"

namespace espalier {

// 64-byte aligned floats: one cache line, one AVX-512 register.
class AlignedFloats {
 public:
  AlignedFloats() = default;
  explicit AlignedFloats(size_t count)
      : data_(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();  // as a vector does
  }

  float* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float[], Free> data_;
};

struct Activations {
  AlignedFloats residual;   // [rows, hidden]                the residual stream
  AlignedFloats normed;     // [rows, hidden]                input of a block's products
  AlignedFloats q;          // [rows, heads * head_dim]      queries, rotated in place
  AlignedFloats k;          // [rows, kv_heads * head_dim]   keys, rotated in place
  AlignedFloats v;          // [rows, kv_heads * head_dim]   values
  AlignedFloats attention;  // [rows, heads * head_dim]      attention's output, before o
  AlignedFloats gate;       // [rows, channels]              gate, then silu(gate) * up
  AlignedFloats up;         // [rows, channels]

  Activations(const ModelConfig& config, int max_rows) {
    for (const auto& [buffer, width] : Widths(config)) {
      this->*buffer = AlignedFloats(size_t(max_rows) * width);
    }
  }

  // What the constructor takes, to be asked before.
  static uint64_t BytesFor(const ModelConfig& config, int max_rows) {
    uint64_t bytes = 0;
    for (const auto& [buffer, width] : Widths(config)) bytes += width * max_rows * sizeof(float);
    return bytes;
  }

 private:
  static std::array<std::pair<AlignedFloats Activations::*, uint64_t>, 8> Widths(
      const ModelConfig& config) {
    const uint64_t hidden = config.hidden;
    const uint64_t channels = config.channels;
    const uint64_t queries = uint64_t(config.heads) * config.head_dim;
    const uint64_t keys = uint64_t(config.kv_heads) * config.head_dim;
    const uint64_t widest =
        std::max({hidden, channels, queries});  // a probe of heads is there, too
    return {{{&Activations::residual, hidden},
             {&Activations::normed, hidden},
             {&Activations::q, queries},
             {&Activations::k, keys},
             {&Activations::v, keys},
             {&Activations::attention, queries},
             {&Activations::gate, widest},
             {&Activations::up, widest}}};
  }
};

}  // namespace espalier
