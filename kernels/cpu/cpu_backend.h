// The CPU backend: run-time dispatch over instruction sets and a persistent worker pool.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace espalier {

enum class Isa { kPortable, kAvx2, kAvxVnni, kAvx512Vnni, kAmx };

// "portable", "avx2", "avxvnni", "avx512", "amx".
std::string_view IsaName(Isa isa);
absl::StatusOr<Isa> ParseIsa(std::string_view name);

// Instruction sets this build has and this machine can run, weakest first; never empty.
std::vector<Isa> SupportedIsas();

// Cores this process may really use: CPU affinity and the cgroup's quota (v1 and v2), at least 1.
int UsableCores();

struct CpuBackendOptions {
  std::optional<Isa> isa;  // none: the best supported. An unsupported one is InvalidArgument.
  int threads = 0;         // workers including the caller; 0: UsableCores()
};

absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const CpuBackendOptions& options);

}  // namespace espalier
