#!/usr/bin/env python3
"""Writes a C++ file with copies of the 2:4 kernels, each with one mistake, and a table of them.

python3 mutants.py kernels/cuda/sparse24.cu out.cc. Fails where a mistake no longer fits the kernels.
"""

import sys

# Name, the kinds of fault (FaultKind) one of which tells of it (none: results are wrong, all else is
# right), what it replaces, by what.
MUTANTS = [
    ("NoBarrier", ["Race", "Uninitialised"], "  __syncthreads();\n", ""),
    ("BarrierForSome", ["Divergence"], "  __syncthreads();\n", "  if (refuse) __syncthreads();\n"),
    ("TwoBarriersOnOneLine", ["Divergence"], "  __syncthreads();\n",
     "  if (warp == 0) __syncthreads(); else __syncthreads();\n"),
    ("LeavesBeforeBarrier", ["Divergence"], "  __syncthreads();\n",
     "  if (warp == 2) return;\n  __syncthreads();\n"),
    ("WritesSharedOnlyIfRefused", ["Uninitialised"], "if (lane == 0) refused_lanes",
     "if (lane == 0 && lanes != 0) refused_lanes"),
    ("SharedArrayTooShort", ["OutOfBounds"], "kThreads / kLanes);", "kThreads / kLanes - 1);"),
    ("AllWarpsInOneSlot", ["Race"], "refused_lanes[warp] = lanes", "refused_lanes[0] = lanes"),
    ("GroupPastTheEnd", ["OutOfBounds", "Race"], "position.group < groups;",
     "position.group <= groups;"),
    ("OutputsOverlap", ["Race"], "position.output * groups + position.group",
     "position.output * (groups - 1) + position.group"),
    ("OneValueLate", ["Misaligned"], "(values + at.index * kGroup);\n    unsigned",
     "(values + at.index * kGroup + 1);\n    unsigned"),
    ("ShufflesInBranch", ["Divergence"], "  word |= __shfl_xor_sync(kAllLanes, word, 1);",
     "  if (at.inside) word |= __shfl_xor_sync(kAllLanes, word, 1);"),
    ("FourWriteOneWord", ["Race"], "if (at.inside && at.group % kGroupsOfWord == 0) places",
     "if (at.inside) places"),
    ("LastWordNotWritten", ["Uninitialised"],
     "if (at.inside && at.group % kGroupsOfWord == 0) places",
     "if (at.inside && at.group % kGroupsOfWord == 3) places"),
    ("MinimumNotAtomic", ["Race"],
     "atomicMin(refused, static_cast<unsigned long long>(index));",
     "if (static_cast<unsigned long long>(index) < *refused) *refused = index;"),
    ("VotesWithoutTheLastLane", ["PartialWarp"], "__ballot_sync(kAllLanes, refuse)",
     "__ballot_sync(kAllLanes >> 1, refuse)"),
    ("LaunchesOnDefaultStream", ["Stream"], "kThreads, stream, values,",
     "kThreads, (void(stream), nullptr), values,"),
    ("UnpacksOneValueLate", ["Misaligned"], "(kept + at.index * 2);", "(kept + at.index * 2 + 1);"),
    ("UnpacksByTheNextWord", ["OutOfBounds"], "places[at.word] >>", "places[at.word + 1] >>"),
    ("UnpacksPastTheEnd", ["OutOfBounds", "Race"], "if (at.inside) {\n    const int own_places",
     "{\n    const int own_places"),
    ("UnpacksByANeighboursPlaces", [], ">> at.group % kGroupsOfWord * 4 & 15",
     ">> (at.group ^ 1) % kGroupsOfWord * 4 & 15"),
    ("TakesOnePlaceTwice", [], "refuse = low >= high", "refuse = low > high"),
    ("SignMakesAValue", [], "0x7fff", "0xffff"),
    ("OtherPlacesOfNone", [], "nonzero = 0b0011;", "nonzero = 0b0101;"),
    ("OtherPlaceBesideTheLast", [], "nonzero = 0b1100;", "nonzero = 0b1010;"),
    ("OtherPlaceBesideOne", [], "nonzero |= 0b1000;", "nonzero |= 0b0001;"),
]


def main():
    source, out = sys.argv[1:]
    with open(source, encoding="utf-8") as file:
        kernels = file.read()
    # Included before, so that the copies' own includes, in a namespace each, are empty.
    parts = ['#include "tests/simt/mutants.h"\n\n#include "kernels/cuda/arch.cuh"\n'
             '#include "kernels/cuda/sparse24.h"\n']
    table = []
    for name, kinds, old, new in MUTANTS:
        if kernels.count(old) != 1:
            sys.exit(f"mutants.py: {name}: expected once in {source}: {old!r}")
        mutant = kernels.replace(old, new)
        for word in ("namespace espalier::cuda {", "}  // namespace espalier::cuda"):
            mutant = mutant.replace(word, word.replace("::cuda", f"::mutants::{name}"))
        parts.append(mutant)
        found_by = ", ".join(f"simt::FaultKind::k{kind}" for kind in kinds)
        table.append(f'    {{"{name}", {{{found_by}}}, &mutants::{name}::PackSparse24, '
                     f"&mutants::{name}::UnpackSparse24}},\n")
    parts.append("namespace espalier::simt {\n\nconst std::vector<Mutant> kMutants = {\n" +
                 "".join(table) + "};\n\n}  // namespace espalier::simt\n")
    with open(out, "w", encoding="utf-8") as file:
        file.write("\n".join(parts))


if __name__ == "__main__":
    main()
