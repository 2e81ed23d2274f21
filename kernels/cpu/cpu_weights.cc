// What lives on the device: weights, gathered panels, KV pages.
#include <sys/mman.h>
#include <unistd.h>

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

int64_t GroupsOf(int rows) { return (int64_t{rows} + kGroup - 1) / kGroup; }

// Bytes of values and of scales, or false if they cannot be told in 63 bits.
bool SizesOf(const Weight& weight, size_t* values, size_t* scales) {
  const int64_t size = weight.type == WeightType::kInt8 ? 1 : sizeof(float);
  const int64_t scale_count = weight.layout == WeightLayout::kOutputRows
                                  ? weight.rows * (weight.row_stride / kGroup)
                                  : GroupsOf(weight.rows) * weight.row_stride;
  int64_t value_bytes, scale_bytes, total;
  if (__builtin_mul_overflow(weight.rows * size, weight.row_stride, &value_bytes) ||
      __builtin_mul_overflow(scale_count, sizeof(float), &scale_bytes) ||
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
  }
  return weight;
}

bool AllFinite(const float* values, int count) {
  bool finite = true;
  for (int i = 0; i < count; ++i) finite &= std::fabs(values[i]) <= FLT_MAX;
  return finite;
}

// Quantises up to kGroup rows [count, stride], one scale per column; same rounding as
// KernelTable::quantize_row.
void QuantizeColumns(const float* rows, int count, int64_t stride, int8_t* values, float* scales) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: no room is left for a fraction
  for (int64_t c = 0; c < stride; ++c) {
    float max = 0;
    for (int r = 0; r < count; ++r) max = std::max(max, std::fabs(rows[r * stride + c]));
    const float inverse = max > kTinyGroup ? 127.0f / max : 0.0f;
    for (int r = 0; r < count; ++r) {
      values[r * stride + c] =
          static_cast<int8_t>(rows[r * stride + c] * inverse + kRounder - kRounder);
    }
    scales[c] = max / 127.0f;
  }
}

}  // namespace

std::shared_ptr<void> AllocateAligned(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  // Linux grants more than the machine has, and kills whoever touches it.
  static const size_t physical =
      static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (bytes > physical) return nullptr;
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
  const int64_t groups = stride / kGroup;
  auto* values = static_cast<std::byte*>(weight->storage.get());
  auto* scales = const_cast<float*>(weight->scales);
  std::atomic<int> first_bad = INT_MAX;
  // A chunk is a group of rows: what kInputRows needs to choose a scale.
  pool_.Run(static_cast<int>(GroupsOf(rows)), [&](int, int chunk) {
    const int begin = chunk * kGroup;
    const int count = std::min(kGroup, rows - begin);
    std::vector<float> buffer(type == WeightType::kInt8 ? count * stride : 0);
    float* const floats = type == WeightType::kInt8
                              ? buffer.data()
                              : reinterpret_cast<float*>(values) + begin * stride;
    for (int r = 0; r < count; ++r) {
      float* row = floats + r * stride;
      std::fill(row + cols, row + stride, 0.0f);
      read_row(begin + r, row);
      if (!AllFinite(row, cols)) {
        const int bad = begin + r;
        for (int seen = first_bad; bad < seen && !first_bad.compare_exchange_weak(seen, bad);) {
        }
        return;
      }
    }
    if (type == WeightType::kF32) return;
    int8_t* to = reinterpret_cast<int8_t*>(values) + begin * stride;
    if (layout == WeightLayout::kInputRows) {
      QuantizeColumns(floats, count, stride, to, scales + chunk * stride);
      return;
    }
    std::vector<int32_t> offsets(groups);
    for (int r = 0; r < count; ++r) {
      kernels_.quantize_row(floats + r * stride, cols, to + r * stride,
                            scales + (begin + r) * groups, offsets.data());
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
  for (int i = 0; i < selection.count(); ++i) {
    Require(selection[i] >= 0 && selection[i] < weight.rows, "GatherRows: row {} of {}",
            selection[i], weight.rows);
  }
  if (weight.type == WeightType::kInt8 && weight.layout == WeightLayout::kInputRows) {
    // Other rows share a scale than did before: quantised anew.
    const auto* values = static_cast<const int8_t*>(weight.values);
    return UploadWeight(weight.type, weight.layout, selection.count(), weight.cols,
                        [&](int i, float* dst) {
                          const int64_t row = selection[i];
                          const int8_t* from = values + row * weight.row_stride;
                          const float* scales = weight.scales + row / kGroup * weight.row_stride;
                          for (int c = 0; c < weight.cols; ++c) dst[c] = from[c] * scales[c];
                        });
  }
  absl::StatusOr<Weight> panel =
      NewWeight(weight.type, weight.layout, selection.count(), weight.cols);
  if (!panel.ok()) return panel;
  const bool int8 = weight.type == WeightType::kInt8;
  const int64_t row_bytes = weight.row_stride * (int8 ? 1 : sizeof(float));
  const int64_t groups = weight.row_stride / kGroup;
  const auto* from = static_cast<const std::byte*>(weight.values);
  auto* to = static_cast<std::byte*>(panel->storage.get());
  ForRows(selection.count(), weight.cols, [&](int i) {
    const int64_t row = selection[i];
    std::memcpy(to + i * row_bytes, from + row * row_bytes, row_bytes);
    if (int8) {
      std::memcpy(const_cast<float*>(panel->scales) + i * groups, weight.scales + row * groups,
                  groups * sizeof(float));
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
