#include "kernels/cuda/arch.cuh"
#include "kernels/cuda/sparse24.h"

// Kernels lie in no anonymous namespace: who looks at what nvcc made of one finds it by its name.
namespace espalier::cuda {

// A thread takes a group, a block neighbouring groups of one output. So a warp's loads and stores
// are neighbours too, of 8 bytes for values and 4 for those kept.
constexpr int kGroup = 4;
constexpr int kGroupsOfWord = 4;
constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kThreads = 256;

using Word32 [[gnu::may_alias]] = uint32_t;
using Word64 [[gnu::may_alias]] = uint64_t;

// Where a thread's group lies; the last threads of an output have none.
struct Position {
  int64_t output;
  int group;
  bool inside;
  int64_t index;  // of the group
  int64_t word;   // of its places
};

__device__ inline Position PositionOf(int groups, int blocks_of_output) {
  Position position;
  position.output = blockIdx.x / blocks_of_output;
  position.group = blockIdx.x % blocks_of_output * kThreads + threadIdx.x;
  position.inside = position.group < groups;
  position.index = position.output * groups + position.group;
  position.word = position.output * ((groups + kGroupsOfWord - 1) / kGroupsOfWord) +
                  position.group / kGroupsOfWord;
  return position;
}

// Leaves the first index of a refused group in `*refused`. A block sends its first one only: of a
// matrix that is dense by mistake, every group would go to the one address.
__device__ inline void Refuse(bool refuse, int64_t index, unsigned long long* refused) {
  SHARED_ARRAY(unsigned, refused_lanes, kThreads / kLanes);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const unsigned lanes = __ballot_sync(kAllLanes, refuse);
  if (lane == 0) refused_lanes[warp] = lanes;
  __syncthreads();
  if (!refuse || lane != __ffs(lanes) - 1) return;
  for (int before = 0; before < warp; ++before) {
    if (refused_lanes[before] != 0) return;
  }
  atomicMin(refused, static_cast<unsigned long long>(index));
}

// Two places in four bits, the lower one in the lower two, by bits that tell which values are not
// zero. Of fewer than two such, places of the same zeros as on the CPU.
__device__ inline unsigned PlacesOf(unsigned nonzero) {
  if (nonzero == 0) nonzero = 0b0011;
  if (nonzero == 0b1000) nonzero = 0b1100;
  if (__popc(nonzero) == 1) nonzero |= 0b1000;
  return (__ffs(nonzero) - 1) | (kLanes - 1 - __clz(nonzero)) << 2;
}

__global__ void __launch_bounds__(kThreads)
    PackSparse24Kernel(const uint16_t* values, int groups, int blocks_of_output, uint16_t* kept,
                       uint16_t* places, unsigned long long* refused) {
  const Position at = PositionOf(groups, blocks_of_output);
  unsigned own_places = 0;
  bool refuse = false;
  if (at.inside) {
    const uint64_t group = *reinterpret_cast<const Word64*>(values + at.index * kGroup);
    unsigned nonzero = 0;
    for (int place = 0; place < kGroup; ++place) {
      nonzero |= (group >> 16 * place & 0x7fff) != 0 ? 1u << place : 0;
    }
    refuse = __popc(nonzero) > 2;
    own_places = PlacesOf(nonzero);
    const int low = own_places & 3, high = own_places >> 2;
    *reinterpret_cast<Word32*>(kept + at.index * 2) =
        static_cast<uint32_t>((group >> 16 * low & 0xffff) | (group >> 16 * high & 0xffff) << 16);
  }
  // Four neighbours share a word.
  unsigned word = own_places << at.group % kGroupsOfWord * 4;
  word |= __shfl_xor_sync(kAllLanes, word, 1);
  word |= __shfl_xor_sync(kAllLanes, word, 2);
  if (at.inside && at.group % kGroupsOfWord == 0) places[at.word] = static_cast<uint16_t>(word);
  Refuse(refuse, at.index, refused);
}

__global__ void __launch_bounds__(kThreads)
    UnpackSparse24Kernel(const uint16_t* kept, const uint16_t* places, int groups,
                         int blocks_of_output, uint16_t* values, unsigned long long* refused) {
  const Position at = PositionOf(groups, blocks_of_output);
  bool refuse = false;
  if (at.inside) {
    const int own_places = places[at.word] >> at.group % kGroupsOfWord * 4 & 15;
    const int low = own_places & 3, high = own_places >> 2;
    refuse = low >= high;
    const uint32_t pair = *reinterpret_cast<const Word32*>(kept + at.index * 2);
    *reinterpret_cast<Word64*>(values + at.index * kGroup) =
        static_cast<uint64_t>(pair & 0xffff) << 16 * low | static_cast<uint64_t>(pair >> 16)
                                                               << 16 * high;
  }
  Refuse(refuse, at.index, refused);
}

// Blocks for one output, and for all: 0 for a matrix without values, -1 for none.
struct Blocks {
  int of_output;
  int64_t all;
};

Blocks BlocksOf(int outputs, int depth) {
  if (outputs < 0 || depth < 0 || depth % kGroup != 0) return {0, -1};
  const int of_output = (depth / kGroup + kThreads - 1) / kThreads;
  const int64_t all = int64_t{outputs} * of_output;
  return {of_output, all <= INT32_MAX ? all : -1};
}

constexpr int kSuccess = 0, kInvalidValue = 1;

int PackSparse24(const uint16_t* values, int outputs, int depth, uint16_t* kept, uint16_t* places,
                 unsigned long long* refused, CUstream_st* stream) {
  const Blocks blocks = BlocksOf(outputs, depth);
  if (blocks.all <= 0) return blocks.all == 0 ? kSuccess : kInvalidValue;
  return Launch(PackSparse24Kernel, static_cast<unsigned>(blocks.all), kThreads, stream, values,
                depth / kGroup, blocks.of_output, kept, places, refused);
}

int UnpackSparse24(const uint16_t* kept, const uint16_t* places, int outputs, int depth,
                   uint16_t* values, unsigned long long* refused, CUstream_st* stream) {
  const Blocks blocks = BlocksOf(outputs, depth);
  if (blocks.all <= 0) return blocks.all == 0 ? kSuccess : kInvalidValue;
  return Launch(UnpackSparse24Kernel, static_cast<unsigned>(blocks.all), kThreads, stream, kept,
                places, depth / kGroup, blocks.of_output, values, refused);
}

}  // namespace espalier::cuda
