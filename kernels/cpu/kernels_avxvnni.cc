// The CPU kernels for AVX2 with AVX-VNNI: client processors without AVX-512. Everything is local to
// this file, see kernel_table.h for why.
#include <immintrin.h>

#include "kernels/cpu/kernel_table.h"

namespace espalier {
namespace {

// clang-format off: the order matters
#include "kernels/cpu/picks_by_lane.h"
#include "kernels/cpu/lanes_avx2.h"
#include "kernels/cpu/dots_avxvnni.h"
#include "kernels/cpu/body_exp.h"
#include "kernels/cpu/no_tiles.h"
#include "kernels/cpu/body_matmul.h"
#include "kernels/cpu/body_kv4.h"
#include "kernels/cpu/body_attention.h"
#include "kernels/cpu/body_rows.h"
#include "kernels/cpu/body_pack.h"
// clang-format on

constexpr KernelTable kTable = {
    .pack_integers = PackIntegers,
    .gather_integers = GatherIntegers,
    .gather_outputs = GatherOutputs,
    .quantize_row = QuantizeRow,
    .matmul = MatMul,
    .attention = Attention,
    .store_kv = StoreKv,
    .pack_kv = PackKv,
    .rotate = Rotate,
    .rms_norm_row = RmsNormRow,
    .swiglu = SwiGlu,
    .logit_block = LogitBlock,
};

}  // namespace

const KernelTable& AvxVnniKernels() { return kTable; }

}  // namespace espalier
