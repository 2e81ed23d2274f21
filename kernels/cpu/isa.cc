#include "kernels/cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(ESPALIER_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstring>
#include <memory>

#include "absl/status/status.h"
#include "fmt/format.h"

namespace espalier {
namespace {

#if defined(__x86_64__)
// VPDPBUSD on AVX2's registers; GCC 12 has no name for it.
bool HasAvxVnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & 1u << 4) != 0;
}
#endif

#if defined(ESPALIER_AMX)
// Of a machine with AVX-512. Linux saves tiles only for processes that ask, since they are 8 KiB a
// thread; the answer holds for all threads, and for good.
bool AskForTiles() {
  unsigned a, b, c, d;
  constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTiles) == 0 || (d & kInt8) == 0) {
    return false;
  }
  unsigned saved, high;  // what the operating system knows to save: bits 17 and 18 are tiles
  asm("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if ((saved >> 17 & 3) != 3) return false;
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;  // asm/prctl.h, since 5.16
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

// One product both ways. Tiles were written without a machine that has them at hand, and some
// virtual ones promise more than they hold: who would give other bits than AVX-512 is not used.
bool TilesAgree() {
  constexpr int kRows = 20, kGroups = 2;
  constexpr int64_t kStripBytes = kGroups * BlockBytes(8);
  alignas(64) uint8_t strips[kTaskStrips * kStripBytes];
  alignas(64) int8_t values[kRows * kGroups * kGroup];
  float scales[kRows * kGroups], sums[kRows * kGroups];
  int32_t counts[kRows * kGroups];
  for (size_t i = 0; i < sizeof(strips); ++i) {
    // In a header: bytes 0 and 0x2a by turns, an fp16 of 0.05.
    const bool header = i % BlockBytes(8) < kBlockHeader;
    strips[i] = static_cast<uint8_t>(header ? i % 2 * 0x2a : i * i * 97 % 241);
  }
  for (size_t i = 0; i < sizeof(values); ++i)
    values[i] = static_cast<int8_t>(i * i * 53 % 255 - 127);
  for (int i = 0; i < kRows * kGroups; ++i) {
    counts[i] = 0;
    for (int k = 0; k < kGroup; ++k) counts[i] += values[i * kGroup + k];
    scales[i] = 0.01f * static_cast<float>(i + 1);
    sums[i] = scales[i] * static_cast<float>(counts[i]);
  }
  MatMulTask task{.bits = 8,
                  .strips = strips,
                  .strip_bytes = kStripBytes,
                  .groups = kGroups,
                  .depth = kGroups * kGroup,
                  .outputs = kTaskOutputs,
                  .rows = kRows,
                  .q = {.values = values,
                        .stride = kGroups * kGroup,
                        .scales = scales,
                        .sums = sums,
                        .counts = counts,
                        .groups = kGroups},
                  .out_stride = kTaskOutputs};
  const auto scratch = std::make_unique<MatMulScratch>();
  float tiles[kRows * kTaskOutputs], lanes[kRows * kTaskOutputs];
  task.out = tiles;
  AmxMatMul(task, scratch.get());
  task.out = lanes;
  Avx512Kernels().matmul(task, scratch.get());
  return std::memcmp(tiles, lanes, sizeof(tiles)) == 0;
}
#endif

}  // namespace

std::string_view IsaName(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvxVnni:
      return "avxvnni";
    case Isa::kAvx512Vnni:
      return "avx512";
    case Isa::kAmx:
      return "amx";
  }
  return "unknown";
}

absl::StatusOr<Isa> ParseIsa(std::string_view name) {
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512Vnni, Isa::kAmx}) {
    if (name == IsaName(isa)) return isa;
  }
  return absl::InvalidArgumentError(fmt::format(
      "instruction set: expected portable, avx2, avxvnni, avx512 or amx, got '{}'", name));
}

std::vector<Isa> SupportedIsas() {
  std::vector<Isa> isas = {Isa::kPortable};
#if defined(__x86_64__)
  // These ask CPUID and also whether the operating system saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2) isas.push_back(Isa::kAvx2);
  if (avx2 && HasAvxVnni()) isas.push_back(Isa::kAvxVnni);
  if (avx2 && avx512) isas.push_back(Isa::kAvx512Vnni);
#if defined(ESPALIER_AMX)
  static const bool tiles = avx512 && AskForTiles() && TilesAgree();
  if (avx2 && tiles) isas.push_back(Isa::kAmx);
#endif
#endif
  return isas;
}

const KernelTable& KernelsOf([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx2) return Avx2Kernels();
  if (isa == Isa::kAvxVnni) return AvxVnniKernels();
  if (isa == Isa::kAvx512Vnni) return Avx512Kernels();
#if defined(ESPALIER_AMX)
  if (isa == Isa::kAmx) {
    static const KernelTable kAmx = [] {
      KernelTable table = Avx512Kernels();
      table.matmul = AmxMatMul;
      return table;
    }();
    return kAmx;
  }
#endif
#endif
  return PortableKernels();
}

}  // namespace espalier
