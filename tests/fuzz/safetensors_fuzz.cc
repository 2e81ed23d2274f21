// Fuzzes a safetensors file: its header and what that says of the bytes behind it.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "engine/model/files/safetensors.h"
#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace espalier;  // NOLINT: the entry point cannot lie in it
  const auto tensors =
      ParseSafetensors("file", std::string_view(reinterpret_cast<const char*>(data), size));
  if (!tensors.ok()) {
    RequireOneLine(tensors.status());
    return 0;
  }
  size_t bytes = 0;
  for (const StoredTensor& tensor : *tensors) {
    ReadRows(tensor);
    bytes += tensor.bytes;
  }
  Require(bytes < size, "tensors share no bytes");
  return 0;
}
