// What lives on the device: weights, gathered panels, KV pages.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>

#include "fmt/format.h"
#include "kernels/cgroup.h"
#include "kernels/cpu/cpu_backend_impl.h"
#include "kernels/cpu/require.h"
#include "kernels/cpu/weight_blocks.h"
#include "kernels/sparse24.h"

namespace espalier {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

static_assert(kGroup == kQuantGroup);

int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

int64_t MachinePage() {
  static const int64_t page = sysconf(_SC_PAGESIZE);
  return page;
}

// The whole pages of the machine's between two addresses, which may begin in one.
struct WholePages {
  WholePages(const void* from, size_t size)
      : begin(RoundUp(reinterpret_cast<intptr_t>(from), MachinePage())),
        end((reinterpret_cast<intptr_t>(from) + static_cast<intptr_t>(size)) / MachinePage() *
            MachinePage()) {}
  size_t bytes() const { return begin < end ? end - begin : 0; }
  // And not to come back by themselves: where a part of a huge page is still in use, the kernel
  // would make it whole again with zeros, some seconds later.
  void GiveBack() const {
    Advise(MADV_NOHUGEPAGE);
    Advise(MADV_DONTNEED);
  }
  void TakeBack() const { Advise(MADV_HUGEPAGE); }
  void Advise(int advice) const {
    if (bytes() > 0) madvise(reinterpret_cast<void*>(begin), bytes(), advice);  // only a wish
  }

  intptr_t begin;
  intptr_t end;
};

// With room for `groups` groups of the summed dimension.
template <typename Allocate>
absl::StatusOr<Weight> NewWeight(const Allocate& allocate, WeightType type, WeightLayout layout,
                                 int rows, int cols, int groups) {
  Weight weight{.type = type, .layout = layout, .rows = rows, .cols = cols, .groups = groups};
  int64_t total;
  const bool sized = !__builtin_mul_overflow(StripsOf(weight), StripBytes(weight), &total);
  weight.bytes = sized ? total : 0;
  weight.storage = sized ? allocate(weight.bytes) : nullptr;
  if (weight.storage == nullptr) {
    return absl::ResourceExhaustedError(
        sized ? fmt::format("no memory for a weight of {} bytes ({} rows by {} columns)",
                            weight.bytes, rows, cols)
              : fmt::format("a weight of {} rows by {} columns has too many bytes", rows, cols));
  }
  weight.blocks = static_cast<const uint8_t*>(weight.storage.get());
  weight.releasable = WholePages(weight.blocks, weight.bytes).bytes();
  return weight;
}

uint8_t* MutableBlocks(const Weight& weight) { return static_cast<uint8_t*>(weight.storage.get()); }

bool AllFinite(const float* values, int count) {
  constexpr uint32_t kExponent = 0x7f800000;
  uint32_t bad = 0;  // integers: the compiler makes vectors of them
  for (int i = 0; i < count; ++i) {
    bad |= (std::bit_cast<uint32_t>(values[i]) & kExponent) == kExponent ? 1 : 0;
  }
  return bad == 0;
}

// What this process may hold at most: the machine's memory, or less if a cgroup says so.
size_t MostMemory() {
  size_t most =
      static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (const CgroupFolder& cgroup : CgroupFolders("", "memory")) {
    size_t limit = 0;  // stays if there is no file, or if it says "max"
    std::ifstream(cgroup.path + (cgroup.v2 ? "/memory.max" : "/memory.limit_in_bytes")) >> limit;
    if (limit > 0) most = std::min(most, limit);
  }
  return most;
}

// Remembers the lowest row of which any thread told something.
void Note(int row, std::atomic<int>* first) {
  for (int seen = *first; row < seen && !first->compare_exchange_weak(seen, row);) {
  }
}

}  // namespace

std::shared_ptr<void> AllocateAligned(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  // Linux grants more than there is, and kills whoever touches it.
  static const size_t most = MostMemory();
  if (bytes > most) return nullptr;
  const size_t size = std::max(alignment, static_cast<size_t>(RoundUp(bytes, alignment)));
  void* memory = std::aligned_alloc(alignment, size);
  if (memory == nullptr) return nullptr;
  if (alignment == kHugePage) madvise(memory, size, MADV_HUGEPAGE);  // only a wish
  return std::shared_ptr<void>(memory, std::free);
}

std::shared_ptr<void> CpuBackend::AllocateLasting(size_t bytes) {
  // What is left of a slab for a matrix that does not fit is lost: of 32 MiB a sixteenth at most.
  // Its end is not touched before it is used, and costs nothing until then.
  constexpr size_t kSlab = 16 * kHugePage, kWorthIt = size_t{64} << 10;
  // Whole pages: of weights that leave together, huge pages leave whole.
  const size_t size = RoundUp(bytes, bytes < kWorthIt ? 64 : MachinePage());
  if (size < kWorthIt || size >= kHugePage) return AllocateAligned(bytes);
  if (size > slab_left_) {
    slab_ = AllocateAligned(kSlab);
    slab_left_ = slab_ == nullptr ? 0 : kSlab;
    if (slab_ == nullptr) return AllocateAligned(bytes);
  }
  std::byte* at = static_cast<std::byte*>(slab_.get()) + (kSlab - slab_left_);
  slab_left_ -= size;
  return std::shared_ptr<void>(slab_, at);
}

absl::StatusOr<Weight> CpuBackend::UploadWeight(WeightType type, WeightLayout layout, int rows,
                                                int cols, const WeightSource& source) {
  if (rows < 0 || cols < 0) {
    return absl::InvalidArgumentError(fmt::format("weight of {} rows by {} columns", rows, cols));
  }
  absl::StatusOr<Weight> weight =
      NewWeight([&](size_t bytes) { return AllocateLasting(bytes); }, type, layout, rows, cols,
                GroupsOf(layout == WeightLayout::kOutputRows ? cols : rows));
  if (!weight.ok()) return weight;
  if (absl::Status status = Pack(source, &*weight); !status.ok()) return status;
  return weight;
}

absl::Status CpuBackend::Pack(const WeightSource& source, Weight* to) {
  const Weight& weight = *to;
  const bool output_rows = weight.layout == WeightLayout::kOutputRows;
  const int outputs = output_rows ? weight.rows : weight.cols;
  const int depth = output_rows ? weight.cols : weight.rows;
  const WeightType type = weight.type;
  const int bits = BitsOf(type);
  const int64_t strip_bytes = StripBytes(weight), block_bytes = BlockBytes(bits);
  std::atomic<int> first_bad = INT_MAX, first_large = INT_MAX;
  std::atomic<bool> sparse24 = true;
  const bool as_groups = bits == 4 && source.read_groups && depth % kGroup == 0;

  const auto pack_groups = [&](int begin, int count, uint8_t* strip) {
    std::vector<FourBitGroup> groups(weight.groups);
    if (count < kStripOutputs) std::memset(strip, 0, strip_bytes);
    for (int lane = 0; lane < count; ++lane) {
      source.read_groups(begin + lane, groups.data());
      if (!PackGroups(groups, lane, strip)) return Note(begin + lane, &first_bad);
    }
  };
  const auto pack_values = [&](int begin, int count, uint8_t* block) {
    const auto values = std::make_unique_for_overwrite<float[]>(int64_t{count} * depth);
    for (int lane = 0; lane < count; ++lane) {
      float* output = values.get() + int64_t{lane} * depth;
      source.read_values(begin + lane, output);
      if (!AllFinite(output, depth)) return Note(begin + lane, &first_bad);
      // Dense ones are known by their first groups.
      if (sparse24 && !IsSparse24({output, static_cast<size_t>(depth)})) sparse24 = false;
    }
    float turned[kGroup][kStripOutputs] = {};
    bool fits = true;
    for (int k = 0; k < depth; k += kGroup, block += block_bytes) {
      const int some = std::min(kGroup, depth - k);
      for (int lane = 0; lane < count; ++lane) {
        const float* from = values.get() + int64_t{lane} * depth + k;
        for (int i = 0; i < some; ++i) turned[i][lane] = from[i];
      }
      fits &= PackBlock(kernels_, bits, turned, some, block);
    }
    if (!fits) Note(begin, &first_large);
  };
  pool_.Run(static_cast<int>(StripsOf(weight)), [&](int, int strip) {
    const int begin = strip * kStripOutputs, count = std::min(kStripOutputs, outputs - begin);
    uint8_t* const blocks = MutableBlocks(weight) + strip * strip_bytes;
    as_groups ? pack_groups(begin, count, blocks) : pack_values(begin, count, blocks);
  });
  if (first_bad != INT_MAX) {
    return absl::InvalidArgumentError(
        fmt::format("output {}: expected finite values, got an infinity or NaN", first_bad.load()));
  }
  if (first_large != INT_MAX) {
    return absl::InvalidArgumentError(
        fmt::format("outputs from {} on: expected values within {} for {}, got larger ones",
                    first_large.load(), IsFloat(type) ? "3.38e38" : "65504", WeightTypeName(type)));
  }
  to->sparse24 = sparse24 && !as_groups;
  return absl::OkStatus();
}

void CpuBackend::ReleaseWeight(Weight* weight) {
  std::byte* const begin = static_cast<std::byte*>(weight->storage.get());
  const WholePages pages(begin, weight->bytes);
  // What shares pages with others stays, and is wiped, so that nobody finds values there by luck.
  if (pages.bytes() == 0) {
    std::memset(begin, 0, weight->bytes);
  } else {
    std::byte* const first = reinterpret_cast<std::byte*>(pages.begin);
    std::byte* const last = reinterpret_cast<std::byte*>(pages.end);
    std::memset(begin, 0, first - begin);
    std::memset(last, 0, begin + weight->bytes - last);
  }
  pages.GiveBack();
  weight->blocks = nullptr;
}

absl::Status CpuBackend::RefillWeight(const WeightSource& source, Weight* weight) {
  WholePages(weight->storage.get(), weight->bytes).TakeBack();
  if (absl::Status status = Pack(source, weight); !status.ok()) {
    ReleaseWeight(weight);
    return status;
  }
  weight->blocks = static_cast<const uint8_t*>(weight->storage.get());
  return absl::OkStatus();
}

absl::Status CpuBackend::GatherRows(const Weight& weight, std::span<const int32_t> rows,
                                    Weight* panel) {
  for (const int32_t row : rows) {
    Require(row >= 0 && row < weight.rows, "GatherRows: row {} of {}", row, weight.rows);
  }
  Require(weight.blocks != nullptr, "GatherRows of a released weight");
  const bool output_rows = weight.layout == WeightLayout::kOutputRows;
  const int count = static_cast<int>(rows.size());
  // Memory that it has for as many or more of them.
  const auto allocate = [&](size_t bytes) {
    return panel->storage.use_count() == 1 && bytes <= panel->bytes ? panel->storage
                                                                    : AllocateAligned(bytes);
  };
  absl::StatusOr<Weight> made =
      NewWeight(allocate, output_rows || IsFloat(weight.type) ? weight.type : WeightType::kInt8,
                weight.layout, count, weight.cols, output_rows ? weight.groups : GroupsOf(count));
  if (!made.ok()) return made.status();
  if (panel->blocks == nullptr && made->storage == panel->storage) {  // it was released
    WholePages(panel->storage.get(), panel->bytes).TakeBack();
  }
  output_rows ? GatherOutputRows(weight, rows, *made) : GatherInputRows(weight, rows, *made);
  if (made->storage == panel->storage) {
    made->bytes = panel->bytes;
    made->releasable = panel->releasable;
  }
  *panel = *std::move(made);
  return absl::OkStatus();
}

void CpuBackend::GatherOutputRows(const Weight& weight, std::span<const int32_t> rows,
                                  const Weight& panel) {
  pool_.Run(static_cast<int>(StripsOf(panel)), [&](int, int strip) {
    const int first = strip * kStripOutputs;
    int32_t some[kStripOutputs];
    for (int i = 0; i < kStripOutputs; ++i) some[i] = rows[std::min(first + i, panel.rows - 1)];
    kernels_.gather_outputs(BitsOf(weight.type), weight.blocks, StripBytes(weight), some,
                            weight.groups, MutableBlocks(panel) + strip * StripBytes(panel));
  });
}

void CpuBackend::GatherInputRows(const Weight& weight, std::span<const int32_t> rows,
                                 const Weight& panel) {
  const int64_t floats = int64_t{2} * kStripOutputs * weight.groups;
  if (gather_scratch_floats_ < floats) {
    GrowScratch(floats * int64_t{sizeof(float)}, &gather_scratch_);
    gather_scratch_floats_ = floats;
  }
  pool_.Run(static_cast<int>(StripsOf(panel)), [&](int worker, int strip) {
    GatherInputs(kernels_, BitsOf(weight.type), weight.blocks + strip * StripBytes(weight),
                 weight.groups, rows, static_cast<float*>(gather_scratch_[worker].get()),
                 MutableBlocks(panel) + strip * StripBytes(panel));
  });
}

absl::StatusOr<KvPool> CpuBackend::CreateKvPool(const KvPoolShape& shape) {
  int64_t page_bytes, bytes;
  if (shape.pages < 0 || shape.kv_heads <= 0 || shape.head_dim <= 0 || shape.head_dim % 2 != 0) {
    return absl::InvalidArgumentError(
        fmt::format("KV pool of {} pages, {} KV heads of dimension {}: expected positive numbers "
                    "and an even dimension",
                    shape.pages, shape.kv_heads, shape.head_dim));
  }
  const auto head_bytes = static_cast<int64_t>(shape.head_bytes());  // < 2^38
  if (__builtin_mul_overflow(2 * head_bytes, shape.kv_heads, &page_bytes) ||
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

void CpuBackend::FitKvPool(std::span<const std::pair<int32_t, int32_t>> moves, int pages,
                           KvPool* pool) {
  Require(pages >= 0 && pages <= pool->shape.pages, "{} KV pages of {}", pages, pool->shape.pages);
  const size_t bytes = pool->shape.page_bytes();
  const auto at = [&](int64_t page) {
    Require(page >= 0 && page <= pool->shape.pages, "KV page {} of {}", page, pool->shape.pages);
    return pool->data + page * static_cast<int64_t>(bytes);
  };
  for (const auto& [from, to] : moves) std::memcpy(at(to), at(from), bytes);
  WholePages(at(0), bytes * pages).TakeBack();
  WholePages(at(pages), bytes * (pool->shape.pages - pages)).GiveBack();
}

}  // namespace espalier
