// What lives on the device: weights, gathered panels, KV pages.
#include <sys/mman.h>

#include <atomic>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "fmt/format.h"
#include "kernels/cpu/cpu_backend_impl.h"
#include "kernels/cpu/require.h"

namespace espalier {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// Kernels read the scales of kPanelTiles tiles at a time, and so past the last.
constexpr size_t kScaleSlack = kPanelTiles * kTileGroups * sizeof(float);

static_assert(kGroup == kQuantGroup);

int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Bytes of values and of scales, or false if they cannot be told in 63 bits.
bool SizesOf(const Weight& weight, size_t* values, size_t* scales) {
  const int64_t size = weight.type == WeightType::kInt8 ? 1 : sizeof(float);
  const bool output_rows = weight.layout == WeightLayout::kOutputRows;
  const int64_t scales_per_row = output_rows ? weight.row_stride / kQuantGroup : 1;
  const int64_t column_scales = output_rows ? 0 : weight.row_stride;
  int64_t value_bytes, scale_bytes, total;
  if (__builtin_mul_overflow(weight.rows * size, weight.row_stride, &value_bytes) ||
      __builtin_mul_overflow(weight.rows * scales_per_row + column_scales, sizeof(float),
                             &scale_bytes) ||
      __builtin_add_overflow(value_bytes, scale_bytes + kScaleSlack, &total)) {
    return false;
  }
  *values = value_bytes;
  *scales = weight.type == WeightType::kInt8 ? scale_bytes + kScaleSlack : 0;
  return true;
}

absl::StatusOr<Weight> NewWeight(WeightType type, WeightLayout layout, int rows, int cols) {
  if (rows < 0 || cols < 0) {
    return absl::InvalidArgumentError(fmt::format("weight of {} rows by {} columns", rows, cols));
  }
  Weight weight{.type = type,
                .layout = layout,
                .rows = rows,
                .cols = cols,
                .row_stride = RoundUp(cols, kTileDepth)};
  size_t values = 0, scales = 0;
  const bool sized = SizesOf(weight, &values, &scales);
  weight.bytes = values + scales;
  weight.storage = sized ? AllocateAligned(weight.bytes) : nullptr;
  if (weight.storage == nullptr) {
    return absl::ResourceExhaustedError(
        sized ? fmt::format("no memory for a weight of {} bytes ({} rows by {} columns)",
                            weight.bytes, rows, cols)
              : fmt::format("a weight of {} rows by {} columns has too many bytes", rows, cols));
  }
  weight.values = weight.storage.get();
  if (type == WeightType::kInt8) {
    weight.scales =
        reinterpret_cast<const float*>(static_cast<const std::byte*>(weight.values) + values);
    std::memset(const_cast<float*>(weight.scales), 0, scales);
    if (layout == WeightLayout::kInputRows) weight.column_scales = weight.scales + rows;
  }
  return weight;
}

bool AllFinite(const float* values, int count) {
  bool finite = true;
  for (int i = 0; i < count; ++i) finite &= std::fabs(values[i]) <= FLT_MAX;
  return finite;
}

// Root mean square of each column, 1 for a column of zeros: what the columns of a kInputRows weight
// are divided by before a row's one scale is chosen. Partial sums are merged in a fixed order.
void MeasureColumns(int rows, int cols, WorkerPool* pool,
                    const std::function<void(int row, float* dst)>& read_row, float* scales) {
  constexpr int kParts = 16;
  std::vector<double> squares(static_cast<size_t>(kParts) * cols, 0.0);
  pool->Run(kParts, [&](int, int part) {
    std::vector<float> row(cols);
    double* sums = &squares[static_cast<size_t>(part) * cols];
    for (int r = part; r < rows; r += kParts) {
      read_row(r, row.data());
      for (int c = 0; c < cols; ++c) sums[c] += double{row[c]} * row[c];
    }
  });
  for (int c = 0; c < cols; ++c) {
    double sum = 0;
    for (int part = 0; part < kParts; ++part) sum += squares[static_cast<size_t>(part) * cols + c];
    const float scale = static_cast<float>(std::sqrt(sum / std::max(rows, 1)));
    scales[c] = scale > kTinyGroup && scale <= FLT_MAX ? scale : 1.0f;
  }
}

// One scale for the whole row; same rounding as KernelTable::quantize_row.
float QuantizeWholeRow(const float* row, int count, int8_t* values) {
  float max = 0;
  for (int i = 0; i < count; ++i) max = std::max(max, std::fabs(row[i]));
  const float inverse = max > kTinyGroup ? 127.0f / max : 0.0f;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: no room is left for a fraction
  for (int i = 0; i < count; ++i) {
    values[i] = static_cast<int8_t>(row[i] * inverse + kRounder - kRounder);
  }
  return max / 127.0f;
}

}  // namespace

std::shared_ptr<void> AllocateAligned(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  if (bytes > PTRDIFF_MAX - alignment) return nullptr;
  const size_t size = std::max(alignment, static_cast<size_t>(RoundUp(bytes, alignment)));
  void* memory = std::aligned_alloc(alignment, size);
  if (memory == nullptr) return nullptr;
  if (alignment == kHugePage) madvise(memory, size, MADV_HUGEPAGE);  // only a wish
  return std::shared_ptr<void>(memory, std::free);
}

absl::StatusOr<Weight> CpuBackend::UploadWeight(
    WeightType type, WeightLayout layout, int rows, int cols,
    const std::function<void(int row, float* dst)>& read_row) {
  absl::StatusOr<Weight> weight = NewWeight(type, layout, rows, cols);
  if (!weight.ok()) return weight;
  const int64_t stride = weight->row_stride;
  const int64_t groups = stride / kQuantGroup;
  auto* values = static_cast<std::byte*>(weight->storage.get());
  auto* scales = const_cast<float*>(weight->scales);
  auto* column_scales = const_cast<float*>(weight->column_scales);
  if (column_scales != nullptr) MeasureColumns(rows, cols, &pool_, read_row, column_scales);
  std::atomic<int> first_bad = INT_MAX;
  constexpr int kChunk = 16;  // rows
  pool_.Run(rows / kChunk + (rows % kChunk != 0), [&](int, int chunk) {
    std::vector<float> buffer(type == WeightType::kInt8 ? stride : 0);
    std::vector<int32_t> offsets(type == WeightType::kInt8 ? groups : 0);
    const int end = chunk * kChunk + std::min(kChunk, rows - chunk * kChunk);
    for (int r = chunk * kChunk; r < end; ++r) {
      float* row =
          type == WeightType::kInt8 ? buffer.data() : reinterpret_cast<float*>(values) + r * stride;
      std::fill(row + cols, row + stride, 0.0f);
      read_row(r, row);
      if (!AllFinite(row, cols)) {
        for (int seen = first_bad; r < seen && !first_bad.compare_exchange_weak(seen, r);) {
        }
        return;
      }
      if (type == WeightType::kF32) continue;
      int8_t* to = reinterpret_cast<int8_t*>(values) + r * stride;
      if (layout == WeightLayout::kOutputRows) {
        kernels_.quantize_row(row, nullptr, cols, to, scales + r * groups, offsets.data());
      } else {
        for (int c = 0; c < cols; ++c) row[c] /= column_scales[c];
        scales[r] = QuantizeWholeRow(row, static_cast<int>(stride), to);
      }
    }
  });
  if (first_bad != INT_MAX) {
    return absl::InvalidArgumentError(
        fmt::format("row {}: expected finite values, got an infinity or NaN", first_bad.load()));
  }
  return weight;
}

absl::StatusOr<Weight> CpuBackend::GatherRows(const Weight& weight,
                                              const ChannelSelection& selection) {
  absl::StatusOr<Weight> panel =
      NewWeight(weight.type, weight.layout, selection.count(), weight.cols);
  if (!panel.ok()) return panel;
  const int64_t row_bytes =
      weight.row_stride * (weight.type == WeightType::kInt8 ? 1 : sizeof(float));
  const int64_t scales =
      weight.layout == WeightLayout::kOutputRows ? weight.row_stride / kQuantGroup : 1;
  if (weight.column_scales != nullptr) {
    std::memcpy(const_cast<float*>(panel->column_scales), weight.column_scales,
                weight.row_stride * sizeof(float));
  }
  const auto* from = static_cast<const std::byte*>(weight.values);
  auto* to = static_cast<std::byte*>(panel->storage.get());
  ForRows(selection.count(), weight.cols, [&](int i) {
    const int64_t row = selection[i];
    Require(row >= 0 && row < weight.rows, "GatherRows: row {} of {}", row, weight.rows);
    std::memcpy(to + i * row_bytes, from + row * row_bytes, row_bytes);
    if (weight.type == WeightType::kInt8) {
      std::memcpy(const_cast<float*>(panel->scales) + i * scales, weight.scales + row * scales,
                  scales * sizeof(float));
    }
  });
  return panel;
}

absl::StatusOr<KvPool> CpuBackend::CreateKvPool(const KvPoolShape& shape) {
  const int64_t size = shape.type == KvType::kF16 ? 2 : 4;
  int64_t head_bytes, page_bytes, bytes;
  if (shape.pages < 0 || shape.kv_heads <= 0 || shape.head_dim <= 0 || shape.head_dim % 2 != 0) {
    return absl::InvalidArgumentError(
        fmt::format("KV pool of {} pages, {} KV heads of dimension {}: expected positive numbers "
                    "and an even dimension",
                    shape.pages, shape.kv_heads, shape.head_dim));
  }
  if (__builtin_mul_overflow(2 * kPageTokens * size, shape.head_dim, &head_bytes) ||
      __builtin_mul_overflow(head_bytes, shape.kv_heads, &page_bytes) ||
      __builtin_mul_overflow(page_bytes, shape.pages, &bytes)) {
    return absl::ResourceExhaustedError(
        fmt::format("a KV pool of {} pages has too many bytes", shape.pages));
  }
  KvPool pool{.shape = shape, .storage = AllocateAligned(bytes)};
  if (pool.storage == nullptr) {
    return absl::ResourceExhaustedError(
        fmt::format("no memory for a KV pool of {} bytes ({} pages)", bytes, shape.pages));
  }
  pool.data = static_cast<std::byte*>(pool.storage.get());
  return pool;
}

}  // namespace espalier
