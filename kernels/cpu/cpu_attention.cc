// Rotation, KV pages and attention: cuts them into tasks for the workers.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cpu/cpu_backend_impl.h"
#include "kernels/cpu/require.h"

namespace espalier {

static_assert(kPageTokens == kAttentionLanes);

namespace {

static_assert(kMostInt4HeadDim == 256);  // KvPoolShape::may_be_int4

int BitsOf(const KvPoolShape& shape, const AttentionSpan& span) {
  if (span.int4_kv) {
    Require(shape.may_be_int4(), "int4 pages in a pool of {} with heads of {}",
            KvTypeName(shape.type), shape.head_dim);
    return 4;
  }
  return shape.type == KvType::kF32 ? 32 : shape.type == KvType::kF16 ? 16 : 8;
}

int TokensOfPage(const AttentionSpan& span) { return span.int4_kv ? kInt4PageTokens : kPageTokens; }

}  // namespace

void CpuBackend::PrepareAngles(const RopeAndStoreArgs& args) {
  const int rows = args.q.rows;
  const int half = static_cast<int>(args.inverse_frequency.size());
  angles_.spans.assign(rows, -1);
  next_positions_.assign(rows, -1);
  for (size_t s = 0; s < args.spans.size(); ++s) {
    const AttentionSpan& span = args.spans[s];
    Require(span.first_row >= 0 && span.rows >= 0 && span.first_row + span.rows <= rows &&
                span.start >= 0,
            "RopeAndStore: span of rows {} + {} at position {} among {} rows", span.first_row,
            span.rows, span.start, rows);
    for (int i = 0; i < span.rows; ++i) {
      next_positions_[span.first_row + i] = span.start + i;
      angles_.spans[span.first_row + i] = static_cast<int32_t>(s);
    }
  }
  // A layer that some rows leave out has the first rows of the others.
  const bool same =
      angles_.pairing == args.pairing && next_positions_.size() <= angles_.positions.size() &&
      std::equal(args.inverse_frequency.begin(), args.inverse_frequency.end(),
                 angles_.inverse_frequency.begin(), angles_.inverse_frequency.end()) &&
      std::equal(next_positions_.begin(), next_positions_.end(), angles_.positions.begin());
  if (same) return;
  angles_.positions = next_positions_;
  angles_.inverse_frequency.assign(args.inverse_frequency.begin(), args.inverse_frequency.end());
  angles_.pairing = args.pairing;
  GrowTo(&angles_.cosines, static_cast<size_t>(rows) * 2 * half);
  GrowTo(&angles_.sines, static_cast<size_t>(rows) * 2 * half);
  const bool interleaved = args.pairing == RopePairing::kInterleaved;
  ForRows(rows, 64 * half, [&](int r) {
    float* cosines = angles_.cosines.data() + static_cast<int64_t>(r) * 2 * half;
    float* sines = angles_.sines.data() + static_cast<int64_t>(r) * 2 * half;
    for (int i = 0; i < half; ++i) {
      const float angle = static_cast<float>(angles_.positions[r]) * args.inverse_frequency[i];
      const int a = interleaved ? 2 * i : i;
      const int b = interleaved ? 2 * i + 1 : i + half;
      cosines[a] = cosines[b] = std::cos(angle);
      sines[b] = std::sin(angle);
      sines[a] = -sines[b];
    }
  });
}

void CpuBackend::RopeAndStore(const RopeAndStoreArgs& args) {
  const KvPoolShape& shape = args.pool->shape;
  const int dim = shape.head_dim;
  const int rows = args.q.rows;
  Require(2 * args.inverse_frequency.size() == static_cast<size_t>(dim),
          "RopeAndStore: {} frequencies for heads of {}", args.inverse_frequency.size(), dim);
  const bool stores = args.k.cols > 0;
  Require(args.k.rows == rows && args.v.rows == rows && args.q.cols % dim == 0 &&
              (args.k.cols == shape.kv_heads * dim || !stores) && args.v.cols == args.k.cols,
          "RopeAndStore: q [{}, {}], k [{}, {}], v [{}, {}] for {} KV heads of {}", rows,
          args.q.cols, args.k.rows, args.k.cols, args.v.rows, args.v.cols, shape.kv_heads, dim);
  Require(args.page_tables.size() == args.spans.size(), "RopeAndStore: {} page tables, {} spans",
          args.page_tables.size(), args.spans.size());
  PrepareAngles(args);
  Require(
      !stores || args.key_mean.empty() || args.key_mean.size() == static_cast<size_t>(args.k.cols),
      "RopeAndStore: {} means for {} of keys", args.key_mean.size(), args.k.cols);
  const auto head_bytes = static_cast<int64_t>(shape.head_bytes());
  const bool interleaved = args.pairing == RopePairing::kInterleaved;
  ForRows(rows, args.q.cols + 8 * args.k.cols, [&](int r) {
    const int position = angles_.positions[r];
    if (position < 0) return;
    const float* cosines = angles_.cosines.data() + static_cast<int64_t>(r) * dim;
    const float* sines = angles_.sines.data() + static_cast<int64_t>(r) * dim;
    kernels_.rotate(args.q.row(r), args.q.cols / dim, dim, interleaved, cosines, sines);
    if (!stores) return;
    kernels_.rotate(args.k.row(r), shape.kv_heads, dim, interleaved, cosines, sines);
    const AttentionSpan& span = args.spans[angles_.spans[r]];
    const std::span<const int32_t> table = args.page_tables[angles_.spans[r]];
    const int page_tokens = TokensOfPage(span);
    const size_t page = position / page_tokens;
    Require(page < table.size() && table[page] >= 0 && table[page] < shape.pages,
            "RopeAndStore: no page for position {}", position);
    uint8_t* keys = reinterpret_cast<uint8_t*>(args.pool->data) + table[page] * shape.page_bytes();
    for (int h = 0; h < shape.kv_heads; ++h) {
      kernels_.store_kv({.bits = BitsOf(shape, span),
                         .key_page = keys + h * head_bytes,
                         .value_page = keys + (shape.kv_heads + h) * head_bytes,
                         .slot = position % page_tokens,
                         .head_dim = dim,
                         .key = args.k.row(r) + h * dim,
                         .value = args.v.row(r) + h * dim,
                         .key_mean = args.key_mean.empty() ? nullptr : &args.key_mean[h * dim]});
    }
  });
}

void CpuBackend::PackKv(const PackKvArgs& args) {
  const KvPoolShape& shape = args.pool->shape;
  const int dim = shape.head_dim;
  Require(shape.may_be_int4(), "PackKv: a pool of {} with heads of {}", KvTypeName(shape.type),
          dim);
  Require(
      args.key_mean.empty() || args.key_mean.size() == static_cast<size_t>(shape.kv_heads) * dim,
      "PackKv: {} means for {} KV heads of {}", args.key_mean.size(), shape.kv_heads, dim);
  // Scratch of attention is more than enough.
  static_assert(kBlockPages * kAttentionLanes >= kInt4PageTokens);
  if (const int64_t floats = AttentionScratchFloats(dim); floats > attention_scratch_floats_) {
    GrowScratch(floats * static_cast<int64_t>(sizeof(float)), &attention_scratch_);
    attention_scratch_floats_ = floats;
  }
  const auto head_bytes = static_cast<int64_t>(shape.head_bytes());
  const auto head_of = [&](int32_t page, int part) {
    return reinterpret_cast<uint8_t*>(args.pool->data) +
           page * static_cast<int64_t>(shape.page_bytes()) + part * head_bytes;
  };
  for (const KvPacking& packing : args.packings) {
    Require(packing.first >= 0 && packing.first < shape.pages && packing.second >= -1 &&
                packing.second < shape.pages && packing.to >= 0 && packing.to < shape.pages,
            "PackKv: pages {} and {} to {} of {}", packing.first, packing.second, packing.to,
            shape.pages);
  }
  const int parts = 2 * shape.kv_heads;  // heads of K, then of V
  // Those that stay where they are touch no pages but their own, and are done together.
  const auto stays = [](const KvPacking& packing) {
    return packing.to == packing.first || packing.to == packing.second;
  };
  for (size_t begin = 0, end; begin < args.packings.size(); begin = end) {
    end = begin + 1;
    while (stays(args.packings[begin]) && end < args.packings.size() && stays(args.packings[end])) {
      ++end;
    }
    pool_.Run(static_cast<int>(end - begin) * parts, [&](int worker, int task) {
      const KvPacking& packing = args.packings[begin + task / parts];
      const int part = task % parts, kv_head = part % shape.kv_heads;
      const bool keys = part < shape.kv_heads;
      kernels_.pack_kv(
          {.from = {head_of(packing.first, part),
                    packing.second < 0 ? nullptr : head_of(packing.second, part)},
           .to = head_of(packing.to, part),
           .keys = keys,
           .head_dim = dim,
           .mean = keys && !args.key_mean.empty() ? &args.key_mean[kv_head * dim] : nullptr,
           .scratch = static_cast<float*>(attention_scratch_[worker].get())});
    });
  }
}

// Sorts the kept heads by KV head, in groups of at most kMaxQueries.
void CpuBackend::GroupHeads(const AttentionArgs& args) {
  const int kv_heads = args.pool->shape.kv_heads;
  const int sharing = args.heads / kv_heads;
  head_slots_.clear();
  head_groups_.clear();
  for (int kv = 0; kv < kv_heads; ++kv) {
    for (int slot = 0; slot < static_cast<int>(args.heads_kept.size()); ++slot) {
      const int head = args.heads_kept[slot];
      Require(head >= 0 && head < args.heads, "Attention: head {} of {}", head, args.heads);
      if (head / sharing != kv) continue;
      const int end = static_cast<int>(head_slots_.size());
      if (head_groups_.empty() || head_groups_.back().kv_head != kv ||
          end - head_groups_.back().begin == kMaxQueries) {
        head_groups_.push_back({.kv_head = kv, .begin = end});
      }
      head_slots_.push_back(slot);
      head_groups_.back().end = end + 1;
    }
  }
}

void CpuBackend::Attention(const AttentionArgs& args) {
  const KvPoolShape& shape = args.pool->shape;
  const int dim = shape.head_dim;
  Require(args.heads > 0 && args.heads % shape.kv_heads == 0, "Attention: {} heads, {} KV heads",
          args.heads, shape.kv_heads);
  const auto heads_kept = static_cast<int>(args.heads_kept.size());
  const int width = heads_kept * dim;
  Require(args.q.cols == width && args.out.cols == width && args.out.rows == args.q.rows,
          "Attention: q [{}, {}], out [{}, {}] for {} heads of {}", args.q.rows, args.q.cols,
          args.out.rows, args.out.cols, heads_kept, dim);
  Require(args.page_tables.size() == args.spans.size(), "Attention: {} page tables, {} spans",
          args.page_tables.size(), args.spans.size());
  GroupHeads(args);
  if (head_groups_.empty()) return;
  if (const int64_t floats = AttentionScratchFloats(dim); floats > attention_scratch_floats_) {
    GrowScratch(floats * static_cast<int64_t>(sizeof(float)), &attention_scratch_);
    attention_scratch_floats_ = floats;
  }
  // Neighbouring rows share each page that is read: as many as make kMaxQueries queries.
  int largest = 0;
  for (const HeadGroup& group : head_groups_) largest = std::max(largest, group.end - group.begin);
  const int block_rows = std::max(1, kMaxQueries / largest);
  const int groups = static_cast<int>(head_groups_.size());
  // A page is one piece of memory, a head's part of it two, and each piece costs a walk of the page
  // tables. In decode one task sees all heads, if that leaves every worker some.
  int alone = 0;
  for (const AttentionSpan& span : args.spans) alone += span.rows == 1;
  const bool together = alone >= 2 * pool_.threads() && heads_kept <= kMaxQueries;
  const auto groups_of_task = [&](const AttentionSpan& span) {
    return together && span.rows == 1 ? groups : 1;
  };
  GrowTo(&task_ends_, args.spans.size());
  int tasks = 0;
  for (size_t s = 0; s < args.spans.size(); ++s) {
    const AttentionSpan& span = args.spans[s];
    Require(span.first_row >= 0 && span.rows >= 0 && span.first_row + span.rows <= args.q.rows &&
                args.page_tables[s].size() * TokensOfPage(span) >=
                    static_cast<size_t>(span.rows == 0 ? 0 : span.start + span.rows),
            "Attention: span of rows {} + {} at position {} with {} pages", span.first_row,
            span.rows, span.start, args.page_tables[s].size());
    const int blocks = (span.rows + block_rows - 1) / block_rows;
    task_ends_[s] = tasks += blocks * (groups / groups_of_task(span));
  }
  pool_.Run(tasks, [&](int worker, int task) {
    const size_t s =
        std::upper_bound(task_ends_.begin(), task_ends_.begin() + args.spans.size(), task) -
        task_ends_.begin();
    const AttentionSpan& span = args.spans[s];
    // From the end of the span: the rows that see most come first, so the last tasks are short.
    const int left = task_ends_[s] - 1 - task;
    const int bundle = groups_of_task(span), per_block = groups / bundle;
    const int first = left / per_block * block_rows;
    const int end = std::min(span.rows, first + block_rows);
    AttentionQuery queries[kMaxQueries];
    int count = 0;
    for (int g = left % per_block * bundle; g < (left % per_block + 1) * bundle; ++g) {
      const HeadGroup& group = head_groups_[g];
      for (int row = first; row < end; ++row) {
        for (int i = group.begin; i < group.end; ++i) {
          const int64_t at = int64_t{head_slots_[i]} * dim;
          queries[count++] = {.q = args.q.row(span.first_row + row) + at,
                              .out = args.out.row(span.first_row + row) + at,
                              .position = span.start + row,
                              .kv_head = group.kv_head};
        }
      }
    }
    kernels_.attention({.bits = BitsOf(shape, span),
                        .pool = reinterpret_cast<const uint8_t*>(args.pool->data),
                        .page_bytes = static_cast<int64_t>(shape.page_bytes()),
                        .head_bytes = static_cast<int64_t>(shape.head_bytes()),
                        .pages = args.page_tables[s].data(),
                        .kv_heads = shape.kv_heads,
                        .head_dim = dim,
                        .scale = args.scale,
                        .count = count,
                        .queries = queries,
                        .scratch = static_cast<float*>(attention_scratch_[worker].get())});
  });
}

}  // namespace espalier
