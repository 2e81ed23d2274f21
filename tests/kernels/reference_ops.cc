#include "tests/kernels/reference_ops.h"

#include <algorithm>
#include <cmath>

namespace espalier::reference {
namespace {

// Activations, quantised group by group and back.
std::vector<double> RoundTrip(std::span<const float> values) {
  std::vector<double> kept;
  for (size_t begin = 0; begin < values.size(); begin += kQuantGroup) {
    const Quantized q =
        Quantize(values.subspan(begin, std::min<size_t>(kQuantGroup, values.size() - begin)));
    for (int each : q.values) kept.push_back(double{q.scale} * each);
  }
  return kept;
}

// Weights of one group and output, to the nearest of 240 steps and back.
void RoundTripInt8(std::vector<float*> group) {
  const auto [least, most] =
      std::minmax_element(group.begin(), group.end(), [](float* a, float* b) { return *a < *b; });
  const float minimum = RoundToHalf(**least);
  const float scale = RoundToHalf((**most - **least) / 240);
  const float inverse = scale > 0 ? 1 / scale : 0;
  for (float* v : group) {
    const float u = std::clamp(std::nearbyint((*v - minimum) * inverse), 0.0f, 240.0f);
    *v = static_cast<float>(double{scale} * u + minimum);
  }
}

}  // namespace

std::vector<float> Kept(const HostWeight& weight) {
  std::vector<float> values = weight.values;
  if (weight.type == WeightType::kBf16) {
    for (float& v : values) v = RoundToBf16(v);
  }
  if (weight.type != WeightType::kInt8) return values;
  const bool output_rows = weight.layout == WeightLayout::kOutputRows;
  const int outputs = output_rows ? weight.rows : weight.cols;
  const int depth = output_rows ? weight.cols : weight.rows;
  for (int n = 0; n < outputs; ++n) {
    for (int begin = 0; begin < depth; begin += kQuantGroup) {
      std::vector<float*> group;
      for (int k = begin; k < std::min(depth, begin + kQuantGroup); ++k) {
        group.push_back(&values[output_rows ? n * depth + k : k * outputs + n]);
      }
      RoundTripInt8(group);
    }
  }
  return values;
}

Quantized Quantize(std::span<const float> values) {
  float max = 0;
  for (float v : values) max = std::max(max, std::fabs(v));
  Quantized q{.values = std::vector<int>(values.size()), .scale = max / 127.0f};
  if (max == 0) return q;
  const float inverse = 127.0f / max;
  for (size_t i = 0; i < values.size(); ++i) {
    q.values[i] = static_cast<int>(std::nearbyint(values[i] * inverse));
  }
  return q;
}

std::vector<double> Embed(const HostWeight& table, std::span<const int32_t> tokens) {
  const std::vector<float> kept = Kept(table);
  std::vector<double> out;
  for (int32_t token : tokens) {
    const auto row = kept.begin() + static_cast<ptrdiff_t>(token) * table.cols;
    out.insert(out.end(), row, row + table.cols);
  }
  return out;
}

std::vector<double> RmsNorm(const ConstMatrix& x, std::span<const float> weight, double eps) {
  std::vector<double> out;
  for (int r = 0; r < x.rows; ++r) {
    double squares = 0;
    for (int c = 0; c < x.cols; ++c) squares += double{x.row(r)[c]} * x.row(r)[c];
    const double scale = 1 / std::sqrt(squares / x.cols + eps);
    for (int c = 0; c < x.cols; ++c) out.push_back(x.row(r)[c] * scale * weight[c]);
  }
  return out;
}

std::vector<double> MatMul(const ConstMatrix& x, const HostWeight& weight, int channels,
                           std::span<const float> bias) {
  const std::vector<float> kept = Kept(weight);
  const bool output_rows = weight.layout == WeightLayout::kOutputRows;
  const int outputs = output_rows ? channels : weight.cols;
  const int depth = output_rows ? weight.cols : channels;
  std::vector<double> out;
  for (int r = 0; r < x.rows; ++r) {
    const std::vector<float> input(x.row(r), x.row(r) + depth);
    const std::vector<double> exact =
        IsFloat(weight.type) ? std::vector<double>(input.begin(), input.end()) : RoundTrip(input);
    for (int n = 0; n < outputs; ++n) {
      double sum = bias.empty() ? 0 : bias[n];
      for (size_t k = 0; k < exact.size(); ++k) {
        const size_t at =
            output_rows ? static_cast<size_t>(n) * weight.cols + k : k * weight.cols + n;
        sum += exact[k] * kept[at];
      }
      out.push_back(sum);
    }
  }
  return out;
}

std::vector<double> SwiGlu(const ConstMatrix& gate, const ConstMatrix& up) {
  std::vector<double> out;
  for (int r = 0; r < gate.rows; ++r) {
    for (int c = 0; c < gate.cols; ++c) {
      const double g = gate.row(r)[c];
      out.push_back(g / (1 + std::exp(-g)) * up.row(r)[c]);
    }
  }
  return out;
}

std::vector<double> Rotate(const ConstMatrix& x, std::span<const int32_t> positions,
                           std::span<const float> inverse_frequency, RopePairing pairing) {
  const int half = static_cast<int>(inverse_frequency.size());
  std::vector<double> out(static_cast<size_t>(x.rows) * x.cols);
  for (int r = 0; r < x.rows; ++r) {
    for (int head = 0; head < x.cols; head += 2 * half) {
      for (int i = 0; i < half; ++i) {
        const bool interleaved = pairing == RopePairing::kInterleaved;
        const int a = head + (interleaved ? 2 * i : i);
        const int b = interleaved ? a + 1 : a + half;
        // The angle itself is an fp32 product, as in the models' own code.
        const double angle = static_cast<float>(positions[r]) * inverse_frequency[i];
        double* to = &out[static_cast<size_t>(r) * x.cols];
        to[a] = x.row(r)[a] * std::cos(angle) - x.row(r)[b] * std::sin(angle);
        to[b] = x.row(r)[b] * std::cos(angle) + x.row(r)[a] * std::sin(angle);
      }
    }
  }
  return out;
}

std::vector<double> Attention(std::span<const float> q, std::span<const int32_t> heads_kept,
                              int heads, int kv_heads, int head_dim, double scale,
                              std::span<const float> k, std::span<const float> v, int tokens) {
  std::vector<double> out(q.size());
  const int width = kv_heads * head_dim;
  for (size_t i = 0; i < heads_kept.size(); ++i) {
    const int column = heads_kept[i] / (heads / kv_heads) * head_dim;
    std::vector<double> weights(tokens);
    double max = -HUGE_VAL, sum = 0;
    for (int t = 0; t < tokens; ++t) {
      for (int d = 0; d < head_dim; ++d) {
        weights[t] += double{q[i * head_dim + d]} * k[static_cast<size_t>(t) * width + column + d];
      }
      weights[t] *= scale;
      max = std::max(max, weights[t]);
    }
    for (double& w : weights) sum += w = std::exp(w - max);
    for (int t = 0; t < tokens; ++t) {
      for (int d = 0; d < head_dim; ++d) {
        out[i * head_dim + d] += weights[t] / sum * v[static_cast<size_t>(t) * width + column + d];
      }
    }
  }
  return out;
}

LogitStats StatsOf(std::span<const float> logits) {
  const auto largest = std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float v : logits) sum += std::exp(double{v} - *largest);
  return {*largest, static_cast<int>(largest - logits.begin()), *largest + std::log(sum)};
}

float RoundToBf16(float v) {
  int exponent = 0;
  std::frexp(v, &exponent);
  const double unit = std::ldexp(1.0, exponent - 8);
  return static_cast<float>(std::nearbyint(v / unit) * unit);
}

float RoundToHalf(float v) {
  if (v == 0 || std::isnan(v)) return v;
  int exponent = 0;
  std::frexp(v, &exponent);
  // 11 significant bits, but no unit below 2^-24.
  const double unit = std::ldexp(1.0, std::max(exponent - 11, -24));
  return static_cast<float>(std::clamp(std::nearbyint(v / unit) * unit, -65504.0, 65504.0));
}

}  // namespace espalier::reference
