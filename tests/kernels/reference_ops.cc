#include "tests/kernels/reference_ops.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace espalier::reference {
namespace {

std::span<const float> RowOf(const HostWeight& weight, int row) {
  return std::span(weight.values).subspan(static_cast<size_t>(row) * weight.cols, weight.cols);
}

// The selected rows of an int8 kInputRows matrix, quantised per output and group of rows.
// [selection][cols]. A list is made a panel first: rows go through int8 in their own groups, then
// in the list's.
std::vector<float> QuantizeInputRows(const HostWeight& weight, const ChannelSelection& selection) {
  std::vector<float> kept;
  for (int i = 0; i < selection.count(); ++i) {
    const std::span<const float> row = RowOf(weight, selection[i]);
    kept.insert(kept.end(), row.begin(), row.end());
  }
  const int rows = selection.count();
  for (int begin = 0; begin < rows; begin += kQuantGroup) {
    const int count = std::min(kQuantGroup, rows - begin);
    for (int c = 0; c < weight.cols; ++c) {
      std::vector<float> column;
      for (int i = begin; i < begin + count; ++i) column.push_back(kept[i * weight.cols + c]);
      const Quantized q = Quantize(column);
      for (int i = 0; i < count; ++i) kept[(begin + i) * weight.cols + c] = q.scale * q.values[i];
    }
  }
  return kept;
}

// One row of an int8 kOutputRows matrix, quantised group by group and back.
std::vector<double> RoundTrip(std::span<const float> values) {
  std::vector<double> kept;
  for (size_t begin = 0; begin < values.size(); begin += kQuantGroup) {
    const Quantized q =
        Quantize(values.subspan(begin, std::min<size_t>(kQuantGroup, values.size() - begin)));
    for (int each : q.values) kept.push_back(double{q.scale} * each);
  }
  return kept;
}

std::vector<double> MatMulByOutputRows(const ConstMatrix& x, const HostWeight& weight,
                                       const ChannelSelection& selection) {
  const bool int8 = weight.type == WeightType::kInt8;
  const auto kept = [&](std::span<const float> values) {
    return int8 ? RoundTrip(values) : std::vector<double>(values.begin(), values.end());
  };
  std::vector<double> out;
  for (int r = 0; r < x.rows; ++r) {
    const std::vector<double> input = kept({x.row(r), static_cast<size_t>(x.cols)});
    for (int i = 0; i < selection.count(); ++i) {
      const std::vector<double> row = kept(RowOf(weight, selection[i]));
      out.push_back(std::inner_product(row.begin(), row.end(), input.begin(), 0.0));
    }
  }
  return out;
}

std::vector<double> MatMulByInputRows(const ConstMatrix& x, HostWeight weight,
                                      const ChannelSelection& selection) {
  const bool int8 = weight.type == WeightType::kInt8;
  std::vector<int32_t> rows(selection.count());
  for (int i = 0; i < selection.count(); ++i) rows[i] = selection[i];
  if (int8) {
    weight.values = QuantizeInputRows(weight, ChannelSelection::All(weight.rows));
    if (!selection.all()) {
      weight.values = QuantizeInputRows(weight, selection);
      std::iota(rows.begin(), rows.end(), 0);
    }
  }
  std::vector<double> out(static_cast<size_t>(x.rows) * weight.cols);
  for (int r = 0; r < x.rows; ++r) {
    const std::span<const float> values(x.row(r), x.cols);
    const std::vector<double> input =
        int8 ? RoundTrip(values) : std::vector<double>(values.begin(), values.end());
    for (int i = 0; i < x.cols; ++i) {
      for (int n = 0; n < weight.cols; ++n) {
        out[static_cast<size_t>(r) * weight.cols + n] += input[i] * RowOf(weight, rows[i])[n];
      }
    }
  }
  return out;
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
    const std::span<const float> values = RowOf(table, token);
    const std::vector<double> row = table.type == WeightType::kInt8
                                        ? RoundTrip(values)
                                        : std::vector<double>(values.begin(), values.end());
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
  std::vector<double> out = weight.layout == WeightLayout::kOutputRows
                                ? MatMulByOutputRows(x, weight, selection)
                                : MatMulByInputRows(x, weight, selection);
  for (size_t i = 0; !bias.empty() && i < out.size(); ++i) out[i] += bias[i % bias.size()];
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
