#include "kernels/nvml.h"

#include <dlfcn.h>

#include <utility>

#include "fmt/format.h"

namespace espalier {

absl::StatusOr<std::unique_ptr<Nvml>> Nvml::Open(const std::string& library) {
  std::shared_ptr<void> loaded(dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL),
                               [](void* handle) { handle == nullptr ? 0 : dlclose(handle); });
  if (loaded == nullptr) return absl::NotFoundError(dlerror());
  NvmlFunctions functions;
  std::string missing;
  const auto find = [&](const char* name, auto* function) {
    *function =
        reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(loaded.get(), name));
    if (*function == nullptr) missing = name;
  };
  find("nvmlInit_v2", &functions.init);
  find("nvmlShutdown", &functions.shutdown);
  find("nvmlDeviceGetHandleByIndex_v2", &functions.handle_by_index);
  find("nvmlDeviceGetMemoryInfo", &functions.memory);
  if (!missing.empty()) {
    return absl::FailedPreconditionError(fmt::format("{} has no {}", library, missing));
  }
  absl::StatusOr<std::unique_ptr<Nvml>> nvml = Open(functions);
  if (nvml.ok()) (*nvml)->library_ = std::move(loaded);
  return nvml;
}

absl::StatusOr<std::unique_ptr<Nvml>> Nvml::Open(const NvmlFunctions& functions) {
  if (const int error = functions.init(); error != 0) {
    return absl::UnavailableError(fmt::format("NVML does not start: error {}", error));
  }
  void* device = nullptr;
  if (const int error = functions.handle_by_index(0, &device); error != 0) {
    functions.shutdown();
    return absl::UnavailableError(fmt::format("NVML finds no device: error {}", error));
  }
  return std::unique_ptr<Nvml>(new Nvml(functions, device));
}

Nvml::~Nvml() { functions_.shutdown(); }

std::optional<DeviceMemory> Nvml::Read() const {
  NvmlFunctions::Memory memory{};
  if (functions_.memory(device_, &memory) != 0 || memory.free > memory.total) return std::nullopt;
  return DeviceMemory{.total = memory.total, .free = memory.free};
}

}  // namespace espalier
