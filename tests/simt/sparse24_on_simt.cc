#include "tests/simt/sparse24_on_simt.h"

#include <random>

namespace espalier::simt {
namespace {

std::vector<unsigned long long> NoneRefused() { return {cuda::kNoneRefused}; }

}  // namespace

std::vector<uint16_t> RandomSparse24(int outputs, int depth, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<uint16_t> values(static_cast<size_t>(outputs) * depth);
  for (size_t group = 0; group < values.size(); group += kSparseGroup) {
    for (int i = 0; i < kSparseKept; ++i) {
      values[group + random() % kSparseGroup] = static_cast<uint16_t>(random());
    }
  }
  return values;
}

PackedOnSimt PackOnSimt(decltype(&cuda::PackSparse24) pack, const std::vector<uint16_t>& values,
                        int outputs, int depth, uint32_t seed) {
  Device device(seed);
  const size_t count = values.size() / kSparseGroup * kSparseKept;
  const size_t words = static_cast<size_t>(outputs) * ((depth + 15) / 16);
  uint16_t* const kept = device.Allocate<uint16_t>(count);
  uint16_t* const places = device.Allocate<uint16_t>(words);
  unsigned long long* const refused = device.Upload(NoneRefused());
  const int error =
      pack(device.Upload(values), outputs, depth, kept, places, refused, device.stream());
  return {.error = error,
          .sparse = {.outputs = outputs,
                     .depth = depth,
                     .kept = device.Download(kept, count),
                     .places = device.Download(places, words)},
          .refused = device.Download(refused, 1)[0],
          .faults = device.faults()};
}

UnpackedOnSimt UnpackOnSimt(decltype(&cuda::UnpackSparse24) unpack, const Sparse24& sparse,
                            uint32_t seed) {
  Device device(seed);
  const size_t count = static_cast<size_t>(sparse.outputs) * sparse.depth;
  uint16_t* const values = device.Allocate<uint16_t>(count);
  unsigned long long* const refused = device.Upload(NoneRefused());
  const int error = unpack(device.Upload(sparse.kept), device.Upload(sparse.places), sparse.outputs,
                           sparse.depth, values, refused, device.stream());
  return {.error = error,
          .values = device.Download(values, count),
          .refused = device.Download(refused, 1)[0],
          .faults = device.faults()};
}

}  // namespace espalier::simt
