// The CPU's Backend: checks shapes, cuts each op into independent tasks, hands them to the workers.
// What a task computes is the business of a KernelTable.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/worker_pool.h"

namespace espalier {

// Uninitialised memory on a 64-byte boundary, on huge pages where it is large and the system allows
// it; null if there is none.
std::shared_ptr<void> AllocateAligned(size_t bytes);

// Gives each worker fresh scratch of so many bytes; crashes if there is no memory.
void GrowScratch(int64_t bytes, std::vector<std::shared_ptr<void>>* by_worker);

// One thread at a time may call. Workspace grows to the largest call seen and is then kept.
class CpuBackend final : public Backend {
 public:
  CpuBackend(Isa isa, bool isa_forced, int threads);

  std::string Describe() const override;
  uint64_t workspace_bytes() const override;
  absl::StatusOr<Weight> UploadWeight(WeightType type, WeightLayout layout, int rows, int cols,
                                      const WeightSource& source) override;
  absl::Status GatherRows(const Weight& weight, std::span<const int32_t> rows,
                          Weight* panel) override;
  void ReleaseWeight(Weight* weight) override;
  absl::Status RefillWeight(const WeightSource& source, Weight* weight) override;
  absl::StatusOr<KvPool> CreateKvPool(const KvPoolShape& shape) override;
  void FitKvPool(std::span<const std::pair<int32_t, int32_t>> moves, int pages,
                 KvPool* pool) override;
  void Embed(const EmbedArgs& args) override;
  void RmsNorm(const RmsNormArgs& args) override;
  void MatMul(const MatMulArgs& args) override;
  void SwiGlu(const SwiGluArgs& args) override;
  void GatedMlp(const GatedMlpArgs& args) override;
  void RopeAndStore(const RopeAndStoreArgs& args) override;
  void PackKv(const PackKvArgs& args) override;
  void Attention(const AttentionArgs& args) override;
  void LogitStats(const LogitStatsArgs& args) override;
  absl::Status Synchronize() override { return absl::OkStatus(); }
  void ParallelFor(int count, const std::function<void(int)>& fn) override;

 private:
  // Runs fn(row) for all rows, in chunks worth a hand-over; `cost` is about the values of a row.
  template <typename Fn>
  void ForRows(int rows, int cost, const Fn& fn);

  // Tables of the angles of a step's rows. All layers of a step ask for the same ones.
  struct Angles {
    std::vector<int32_t> positions;  // by row; -1 where no span covers it
    std::vector<float> inverse_frequency;
    RopePairing pairing = RopePairing::kInterleaved;
    std::vector<float> cosines;  // [rows, head_dim]
    std::vector<float> sines;    // [rows, head_dim], signed for the pairing
    std::vector<int32_t> spans;  // by row
  };
  void PrepareAngles(const RopeAndStoreArgs& args);

  // Kept query heads that share a KV head: slots [begin, end) of head_slots_.
  struct HeadGroup {
    int kv_head = 0;
    int begin = 0;
    int end = 0;
  };
  void GroupHeads(const AttentionArgs& args);

  // Memory for a weight of the model. Many are smaller than a huge page: they share some, as every
  // step walks over all of them and a walk of page tables waits as long as a dozen lines.
  std::shared_ptr<void> AllocateLasting(size_t bytes);

  // Fills the weight's memory with the source's values.
  absl::Status Pack(const WeightSource& source, Weight* to);

  // Tasks side by side over the same rows, each in `splits` parts.
  struct TaskBlock {
    const MatMulTarget* target = nullptr;  // null: GatedMlp's channels
    int first = 0;                         // first output, or channel
    int outputs = 0;                       // from there on
    int share = 0;                         // of them, cut into tasks by itself: ShareOf
    int splits = 0;
    int rows = 0;       // of all parts
    int part_rows = 0;  // of each but the last
    int end = 0;        // running count of tasks

    // Rows in even parts of at most `most`.
    static TaskBlock Of(int rows, int most);
  };
  struct TaskPlace {
    const TaskBlock* block = nullptr;
    int first = 0;  // output or channel
    int outputs = 0;
    int row = 0;  // of the block's
    int rows = 0;
  };
  // Ends task_blocks_ with this one, but for its last fields: `outputs` in pieces of at most
  // `task_outputs`, whole units each. Returns the tasks so far.
  int AddTasks(TaskBlock block, int task_outputs, int unit);
  // In task_blocks_.
  TaskPlace PlaceOf(int task, int task_outputs) const;
  // Nine tasks of 64 outputs keep one of two workers waiting for a tenth of the time: where that is
  // so, a worker's share ends with a smaller task. Else all outputs.
  int ShareOf(int outputs, int task_outputs, int unit) const;
  // Memory of quantised rows, which grows and is kept.
  struct QuantizedBuffer {
    std::vector<int8_t> values;
    std::vector<float> scales;
    std::vector<float> sums;
    std::vector<int32_t> counts;
  };
  static QuantizedRows Reserve(int rows, int groups, QuantizedBuffer* buffer);
  // The most rows of a task where `tasks_wide` of them lie side by side: few enough to give all
  // workers some.
  int RowsOfTask(int rows, int tasks_wide) const;
  int wanted_tasks() const { return 4 * pool_.threads(); }
  QuantizedRows Quantize(const ConstMatrix& x);
  // `quantized` is read if the weights are integers, else args.x.
  void RunTasks(const MatMulArgs& args, const QuantizedRows& quantized);
  // silu(gate(x)) * up(x), quantised; of integers.
  void MakeChannels(const GatedMlpArgs& args, int channels, const QuantizedRows& made);
  void GatherOutputRows(const Weight& weight, std::span<const int32_t> rows, const Weight& panel);
  void GatherInputRows(const Weight& weight, std::span<const int32_t> rows, const Weight& panel);

  const Isa isa_;
  const bool isa_forced_;
  const KernelTable& kernels_;
  WorkerPool pool_;

  std::shared_ptr<void> slab_;  // of AllocateLasting: the last one, and what is free at its end
  size_t slab_left_ = 0;
  std::vector<std::shared_ptr<void>> matmul_scratch_;    // a MatMulScratch for each worker
  QuantizedBuffer quantized_;                            // a product's input
  QuantizedBuffer quantized_channels_;                   // what GatedMlp makes of it
  std::vector<std::shared_ptr<void>> channels_scratch_;  // ChannelsTile for each worker
  std::vector<TaskBlock> task_blocks_;
  std::vector<MatMulTarget> gated_;         // GatedMlp's products: by gate and up,
  std::vector<MatMulTarget> narrow_;        // and by `down`
  std::vector<const int32_t*> row_places_;  // [rows] of GatedMlp's steps; null: none
  std::vector<int> task_ends_;              // running count of tasks by span
  Angles angles_;
  std::vector<int32_t> next_positions_;
  std::vector<int32_t> head_slots_;
  std::vector<HeadGroup> head_groups_;
  std::vector<std::shared_ptr<void>> gather_scratch_;  // floats for each worker
  int64_t gather_scratch_floats_ = 0;
  std::vector<std::shared_ptr<void>> attention_scratch_;  // floats for each worker
  int64_t attention_scratch_floats_ = 0;
  std::vector<LogitPartial> logit_partials_;
};

// Makes room for `size` elements and never gives any back.
template <typename T>
void GrowTo(std::vector<T>* v, size_t size) {
  if (v->size() < size) v->resize(size);
}

template <typename Fn>
void CpuBackend::ForRows(int rows, int cost, const Fn& fn) {
  constexpr int kChunkCost = 16384;  // some microseconds of work, as much as a hand-over costs
  const int most = std::max(1, kChunkCost / std::max(1, cost));
  const int chunks = rows / most + (rows % most != 0);
  const int chunk = chunks == 0 ? 0 : (rows - 1) / chunks + 1;  // even: 16 + 16, not 28 + 4
  pool_.Run(chunks, [&](int, int index) {
    const int begin = std::min(rows, index * chunk);
    const int end = std::min(rows - begin, chunk) + begin;
    for (int row = begin; row < end; ++row) fn(row);
  });
}

}  // namespace espalier
