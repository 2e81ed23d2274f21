// Memory of an NVIDIA device by its management library, which is loaded when the program runs: a
// machine without one is none the worse.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"

namespace espalier {

// Bytes, whoever holds them.
struct DeviceMemory {
  uint64_t total = 0;
  uint64_t free = 0;
};

// What is called of the library, in its own words and numbers (0: success).
struct NvmlFunctions {
  struct Memory {  // nvmlMemory_t
    unsigned long long total;
    unsigned long long free;
    unsigned long long used;
  };
  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  int (*handle_by_index)(unsigned index, void** device) = nullptr;
  int (*memory)(void* device, Memory* memory) = nullptr;
};

class Nvml {
 public:
  // The first device's. NotFound, with the loader's words, where there is no library;
  // FailedPrecondition where it is not what it should be; Unavailable, with its number, where it
  // finds no device.
  static absl::StatusOr<std::unique_ptr<Nvml>> Open(
      const std::string& library = "libnvidia-ml.so.1");
  // By functions that are there; for tests.
  static absl::StatusOr<std::unique_ptr<Nvml>> Open(const NvmlFunctions& functions);
  ~Nvml();
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;

  // None while the device does not tell. Any thread.
  std::optional<DeviceMemory> Read() const;

 private:
  Nvml(const NvmlFunctions& functions, void* device) : functions_(functions), device_(device) {}

  const NvmlFunctions functions_;
  void* const device_;
  std::shared_ptr<void> library_;  // outlives the last call
};

}  // namespace espalier
