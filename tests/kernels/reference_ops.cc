#include "tests/kernels/reference_ops.h"

#include <algorithm>
#include <cmath>

namespace espalier::reference {
namespace {

// Values of one weight row as the device keeps them: quantised and back, for int8.
std::vector<double> Kept(const HostWeight& weight, int row) {
  const std::span<const float> values(&weight.values[static_cast<size_t>(row) * weight.cols],
                                      weight.cols);
  std::vector<double> kept(values.begin(), values.end());
  if (weight.type == WeightType::kF32) return kept;
  const size_t group = weight.layout == WeightLayout::kOutputRows ? kQuantGroup : values.size();
  for (size_t begin = 0; begin < values.size(); begin += group) {
    const size_t count = std::min(group, values.size() - begin);
    const Quantized q = Quantize(values.subspan(begin, count));
    for (size_t i = 0; i < count; ++i) kept[begin + i] = double{q.scale} * q.values[i];
  }
  return kept;
}

}  // namespace

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
  std::vector<double> out;
  for (int32_t token : tokens) {
    const std::vector<double> row = Kept(table, token);
    out.insert(out.end(), row.begin(), row.end());
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

std::vector<double> MatMul(const ConstMatrix& x, const HostWeight& weight,
                           const ChannelSelection& selection, std::span<const float> bias) {
  const bool output_rows = weight.layout == WeightLayout::kOutputRows;
  const int depth = output_rows ? weight.cols : selection.count();
  const int outputs = output_rows ? selection.count() : weight.cols;
  std::vector<double> out(static_cast<size_t>(x.rows) * outputs);
  std::vector<std::vector<double>> kept;
  for (int i = 0; i < selection.count(); ++i) kept.push_back(Kept(weight, selection[i]));
  for (int r = 0; r < x.rows; ++r) {
    std::vector<double> input(x.row(r), x.row(r) + depth);
    std::vector<double> row_scale(selection.count(), 1);
    if (weight.type == WeightType::kInt8) {
      // kInputRows: a row's scale moves into x, in fp32, before x is quantised.
      std::vector<float> folded(x.row(r), x.row(r) + depth);
      for (int i = 0; !output_rows && i < depth; ++i) {
        const std::span<const float> values(
            &weight.values[static_cast<size_t>(selection[i]) * weight.cols], weight.cols);
        row_scale[i] = Quantize(values).scale;
        folded[i] *= static_cast<float>(row_scale[i]);
      }
      for (int begin = 0; begin < depth; begin += kQuantGroup) {
        const int count = std::min(kQuantGroup, depth - begin);
        const Quantized q = Quantize(std::span<const float>(folded).subspan(begin, count));
        for (int i = 0; i < count; ++i) input[begin + i] = double{q.scale} * q.values[i];
      }
    }
    for (int n = 0; n < outputs; ++n) {
      double sum = bias.empty() ? 0 : bias[n];
      for (int k = 0; k < depth; ++k) {
        if (output_rows) {
          sum += input[k] * kept[n][k];
        } else if (row_scale[k] != 0) {
          sum += input[k] * (kept[k][n] / row_scale[k]);
        }
      }
      out[static_cast<size_t>(r) * outputs + n] = sum;
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

std::vector<double> Attention(std::span<const float> q, const ChannelSelection& heads_kept,
                              int heads, int kv_heads, int head_dim, double scale,
                              std::span<const float> k, std::span<const float> v, int tokens) {
  std::vector<double> out(q.size());
  const int width = kv_heads * head_dim;
  for (int i = 0; i < heads_kept.count(); ++i) {
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

float RoundToHalf(float v) {
  if (v == 0 || std::isnan(v)) return v;
  int exponent = 0;
  std::frexp(v, &exponent);
  // 11 significant bits, but no unit below 2^-24.
  const double unit = std::ldexp(1.0, std::max(exponent - 11, -24));
  return static_cast<float>(std::clamp(std::nearbyint(v / unit) * unit, -65504.0, 65504.0));
}

}  // namespace espalier::reference
