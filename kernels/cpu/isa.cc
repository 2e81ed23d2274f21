#include "kernels/cpu/isa.h"

#include "absl/status/status.h"
#include "fmt/format.h"

namespace espalier {

std::string_view IsaName(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512Vnni:
      return "avx512";
  }
  return "unknown";
}

absl::StatusOr<Isa> ParseIsa(std::string_view name) {
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512Vnni}) {
    if (name == IsaName(isa)) return isa;
  }
  return absl::InvalidArgumentError(
      fmt::format("instruction set: expected portable, avx2 or avx512, got '{}'", name));
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
  if (avx2 && avx512) isas.push_back(Isa::kAvx512Vnni);
#endif
  return isas;
}

const KernelTable& KernelsOf([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx2) return Avx2Kernels();
  if (isa == Isa::kAvx512Vnni) return Avx512Kernels();
#endif
  return PortableKernels();
}

}  // namespace espalier
