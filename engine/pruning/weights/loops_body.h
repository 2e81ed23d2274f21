// The loops in the compiler's vector types of 16 lanes, which it maps to the registers there are.
// Included in the anonymous namespace of each loops_*.cc, so that no two instruction sets share a
// symbol.

constexpr int kLanes = 16;
using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));

inline Floats Load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline void Store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof(v)); }
inline Floats LoadSome(const float* p, int n) {
  Floats v = {};
  __builtin_memcpy(&v, p, n * sizeof(float));
  return v;
}
inline void StoreSome(float* p, Floats v, int n) { __builtin_memcpy(p, &v, n * sizeof(float)); }
inline Ints Bits(Floats v) { return reinterpret_cast<Ints>(v); }
inline Floats Where(Ints mask, Floats v) { return reinterpret_cast<Floats>(mask & Bits(v)); }
inline Floats Abs(Floats v) { return reinterpret_cast<Floats>(Bits(v) & 0x7fffffff); }
inline double Sum(Floats v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

void Score(const float* w, const float* c, int n, float* scores) {
  for (int j = 0; j < n; ++j) scores[j] = w[j] * w[j] * c[j];
}

// Each lane beside another of its group of 4 or 8, `kBy` further on round the group.
template <int kGroup, int kBy>
inline Ints Turned(Ints v) {
  constexpr auto at = [](int i) { return i / kGroup * kGroup + (i % kGroup + kBy) % kGroup; };
  return __builtin_shufflevector(v, v, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7),
                                 at(8), at(9), at(10), at(11), at(12), at(13), at(14), at(15));
}

// 1 in lanes whose other is further right, so that it wins a tie.
template <int kGroup, int kBy>
inline Ints Later() {
  Ints later;
  for (int i = 0; i < kLanes; ++i) later[i] = i % kGroup + kBy < kGroup;
  return later;
}

// A comparator for each pair of a group, all at once: minus how many others each lane loses to.
template <int kGroup, int kBy = 1>
inline Ints Losses(Ints score) {
  const Ints lost = Turned<kGroup, kBy>(score) > score - Later<kGroup, kBy>();
  if constexpr (kBy + 1 < kGroup) {
    return lost + Losses<kGroup, kBy + 1>(score);
  } else {
    return lost;
  }
}

template <int kKeep, int kGroup>
Saliency MaskGroups(float* w, const float* c, int n) {
  Floats all = {}, kept = {};
  const auto mask = [&](Floats values, Floats columns) {
    const Floats score = values * values * columns;
    const Ints stays = Losses<kGroup>(Bits(score)) > -kKeep;
    all += score;
    kept += Where(stays, score);
    return Where(stays, values);
  };
  int j = 0;
  for (; j + kLanes <= n; j += kLanes) Store(w + j, mask(Load(w + j), Load(c + j)));
  if (j < n) StoreSome(w + j, mask(LoadSome(w + j, n - j), LoadSome(c + j, n - j)), n - j);
  return {.all = Sum(all), .kept = Sum(kept)};
}

int64_t CountBelow(const float* scores, int64_t n, float threshold) {
  // Lanes count to 2^31 at most; n is below that.
  Ints below = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) below -= Load(scores + j) < threshold;
  int64_t count = 0;
  for (int i = 0; i < kLanes; ++i) count += below[i];
  for (; j < n; ++j) count += scores[j] < threshold ? 1 : 0;
  return count;
}

Saliency ZeroBelow(float* w, const float* scores, int64_t n, float threshold) {
  double all_of_it = 0, kept_of_it = 0;
  // Float sums of a row's length at most: a matrix taken as one row is long.
  constexpr int64_t kChunk = 4096;
  int64_t j = 0;
  while (j + kLanes <= n) {
    Floats all = {}, kept = {};
    for (const int64_t end = j + kChunk; j + kLanes <= n && j < end; j += kLanes) {
      const Floats score = Load(scores + j);
      const Ints goes = score < threshold;
      Store(w + j, Where(~goes, Load(w + j)));
      all += score;
      kept += Where(~goes, score);
    }
    all_of_it += Sum(all);
    kept_of_it += Sum(kept);
  }
  for (; j < n; ++j) {
    all_of_it += scores[j];
    if (scores[j] < threshold) {
      w[j] = 0;
    } else {
      kept_of_it += scores[j];
    }
  }
  return {.all = all_of_it, .kept = kept_of_it};
}

Saliency Ewma(const EwmaArgs& args) {
  constexpr int kColumns = 64;  // of a tile turned: scores of a column lie in lanes then
  alignas(64) float tile[kColumns * kLanes] = {};
  Floats mean = {}, deviation = {}, all = {}, kept = {};
  for (int begin = 0; begin < args.columns; begin += kColumns) {
    const int count = args.columns - begin < kColumns ? args.columns - begin : kColumns;
    const float* const c = args.column_weights + begin;
    for (int r = 0; r < args.rows; ++r) {
      const float* const w = args.weights + r * args.stride + begin;
      for (int j = 0; j < count; ++j) tile[j * kLanes + r] = w[j] * w[j] * c[j];
    }
    if (begin == 0) {
      const int first = count < 16 ? count : 16;
      for (int j = 0; j < first; ++j) mean += Load(tile + j * kLanes);
      mean /= static_cast<float>(first);
      for (int j = 0; j < first; ++j) deviation += Abs(Load(tile + j * kLanes) - mean);
      deviation /= static_cast<float>(first);
    }
    for (int j = 0; j < count; ++j) {
      const Floats score = Load(tile + j * kLanes);
      const Floats off = score - mean;
      const Ints goes = score < mean + args.k * deviation;
      all += score;
      kept += Where(~goes, score);
      if (args.standing == nullptr) {
        Store(tile + j * kLanes, reinterpret_cast<Floats>(~goes));
      } else {
        Floats standing = off / deviation;
        for (int i = 0; i < kLanes; ++i) {  // below `mean + k * 0` is what is below the mean
          if (deviation[i] == 0) standing[i] = off[i] < 0 ? -__builtin_inff() : __builtin_inff();
        }
        Store(args.standing + int64_t{begin + j} * kLanes, standing);
      }
      deviation = (1 - args.beta) * deviation + args.beta * Abs(off);
      mean = (1 - args.alpha) * mean + args.alpha * score;
    }
    for (int r = 0; r < args.rows && args.standing == nullptr; ++r) {
      float* const w = args.weights + r * args.stride + begin;
      for (int j = 0; j < count; ++j) {
        int32_t stays;
        __builtin_memcpy(&stays, tile + j * kLanes + r, sizeof(stays));
        w[j] = stays != 0 ? w[j] : 0.0f;
      }
    }
  }
  Saliency sums;
  for (int r = 0; r < args.rows; ++r) sums += {.all = all[r], .kept = kept[r]};
  return sums;
}

void AddMoments(const float* x, int n, float* sums, float* squares) {
  for (int j = 0; j < n; ++j) {
    sums[j] += x[j];
    squares[j] += x[j] * x[j];
  }
}

void AddBlock(const float* x, int64_t stride, int rows, float* sums) {
  constexpr int kRegisters = kMomentBlock / kLanes;
  constexpr int kAtOnce = 4;  // 4 x 4 sums stay in 32 registers of 16 lanes
  for (int a = 0; a < kMomentBlock; a += kAtOnce) {
    Floats sum[kAtOnce][kRegisters];
    for (int i = 0; i < kAtOnce; ++i) {
      for (int v = 0; v < kRegisters; ++v) {
        sum[i][v] = Load(sums + (a + i) * kMomentBlock + v * kLanes);
      }
    }
    for (int r = 0; r < rows; ++r) {
      const float* const row = x + r * stride;
      for (int v = 0; v < kRegisters; ++v) {
        const Floats values = Load(row + v * kLanes);
        for (int i = 0; i < kAtOnce; ++i) sum[i][v] += row[a + i] * values;
      }
    }
    for (int i = 0; i < kAtOnce; ++i) {
      for (int v = 0; v < kRegisters; ++v) {
        Store(sums + (a + i) * kMomentBlock + v * kLanes, sum[i][v]);
      }
    }
  }
}

void ObsRow(const ObsArgs& args) {
  alignas(64) float w[kObsWidth] = {};
  uint8_t goes[kMaxGroup];
  __builtin_memcpy(w, args.weights, args.width * sizeof(float));
  for (int j = 0; j < args.width; ++j) {
    const float* const u = args.factor + j * kObsWidth;
    bool prune;
    if (args.pruned != nullptr) {
      prune = args.pruned[j] != 0;
    } else {
      const int in_group = j % args.group;
      if (in_group == 0) {
        float score[kMaxGroup];
        const int size = args.width - j < args.group ? args.width - j : args.group;
        for (int i = 0; i < size; ++i) {
          const float share = w[j + i] / args.factor[(j + i) * kObsWidth + j + i];
          score[i] = share * share;
        }
        for (int i = 0; i < size; ++i) {
          int lost = 0;
          for (int o = 0; o < size; ++o) {
            lost += (score[o] > score[i] || (score[o] == score[i] && o > i)) ? 1 : 0;
          }
          goes[i] = lost >= args.keep ? 1 : 0;
        }
      }
      prune = goes[in_group] != 0;
    }
    args.errors[j] = 0;
    if (!prune) continue;
    const float error = w[j] / u[j];
    args.errors[j] = error;
    // Left of the diagonal the factor is 0.
    for (int l = j / kLanes * kLanes; l < args.width; l += kLanes) {
      Store(w + l, Load(w + l) - error * Load(u + l));
    }
    w[j] = 0;
  }
  __builtin_memcpy(args.weights, w, args.width * sizeof(float));
}

double Dot(const float* a, const float* b, int n) {
  Floats sum = {};
  int j = 0;
  for (; j + kLanes <= n; j += kLanes) sum += Load(a + j) * Load(b + j);
  if (j < n) sum += LoadSome(a + j, n - j) * LoadSome(b + j, n - j);
  return Sum(sum);
}

double SumKept(const float* w, const float* a, int n) {
  Floats sum = {};
  int j = 0;
  for (; j + kLanes <= n; j += kLanes) sum += Where(Load(w + j) != 0.0f, Load(a + j));
  if (j < n) sum += Where(LoadSome(w + j, n - j) != 0.0f, LoadSome(a + j, n - j));
  return Sum(sum);
}

void AddKept(float* w, const float* a, float scale, int n) {
  for (int j = 0; j < n; ++j) w[j] = w[j] != 0 ? w[j] + scale * a[j] : w[j];
}

int64_t Zeros(const float* w, int64_t n) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) count += w[j] == 0 ? 1 : 0;
  return count;
}

int64_t FirstNotFinite(const float* w, int64_t n) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Ints odd = (Bits(Load(w + j)) & 0x7f800000) == 0x7f800000;
    int32_t any = 0;
    for (int i = 0; i < kLanes; ++i) any |= odd[i];
    if (any != 0) break;
  }
  for (; j < n; ++j) {
    if (!__builtin_isfinite(w[j])) return j;
  }
  return n;
}

constexpr WeightLoops kLoops = {
    .score = Score,
    .mask_2_4 = MaskGroups<2, 4>,
    .mask_4_8 = MaskGroups<4, 8>,
    .count_below = CountBelow,
    .zero_below = ZeroBelow,
    .ewma = Ewma,
    .add_moments = AddMoments,
    .add_block = AddBlock,
    .obs_row = ObsRow,
    .dot = Dot,
    .sum_kept = SumKept,
    .add_kept = AddKept,
    .zeros = Zeros,
    .first_not_finite = FirstNotFinite,
};
