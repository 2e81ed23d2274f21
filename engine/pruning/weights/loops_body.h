// The loops in the compiler's vector types of 16 lanes, which it maps to the registers there are.
// Included in the anonymous namespace of each loops_*.cc, so that no two instruction sets share a
// symbol.
#pragma once

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

// Turns 16 vectors: lane i of vector j becomes lane j of vector i.
template <int kBy>
inline void Swap(Floats* v) {
  constexpr auto low = [](int i) { return (i & kBy) == 0 ? i : i - kBy + kLanes; };
  constexpr auto high = [](int i) { return (i & kBy) == 0 ? i + kBy : i + kLanes; };
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kBy) != 0) continue;
    const Floats a = v[i], b = v[i + kBy];
    v[i] = __builtin_shufflevector(a, b, low(0), low(1), low(2), low(3), low(4), low(5), low(6),
                                   low(7), low(8), low(9), low(10), low(11), low(12), low(13),
                                   low(14), low(15));
    v[i + kBy] = __builtin_shufflevector(a, b, high(0), high(1), high(2), high(3), high(4), high(5),
                                         high(6), high(7), high(8), high(9), high(10), high(11),
                                         high(12), high(13), high(14), high(15));
  }
}
inline void Turn(Floats* v) {
  Swap<8>(v);
  Swap<4>(v);
  Swap<2>(v);
  Swap<1>(v);
}

// 16 columns, `count` of them there, of at most 16 rows: each vector a column, its lanes the rows.
inline void LoadColumns(const float* from, int64_t stride, int rows, int count, Floats* columns) {
  for (int r = 0; r < kLanes; ++r) {
    columns[r] = r >= rows         ? Floats{}
                 : count == kLanes ? Load(from + r * stride)
                                   : LoadSome(from + r * stride, count);
  }
  Turn(columns);
}
// Back; `columns` are rows afterwards.
inline void StoreColumns(Floats* columns, float* to, int64_t stride, int rows, int count) {
  Turn(columns);
  for (int r = 0; r < rows; ++r) {
    if (count == kLanes) {
      Store(to + r * stride, columns[r]);
    } else {
      StoreSome(to + r * stride, columns[r], count);
    }
  }
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
inline Floats MaskVector(Floats values, Floats columns, Floats* all, Floats* kept) {
  const Floats score = values * values * columns;
  const Ints stays = Losses<kGroup>(Bits(score)) > -kKeep;
  *all += score;
  *kept += Where(stays, score);
  return Where(stays, values);
}

template <int kKeep, int kGroup>
Saliency MaskGroups(float* w, const float* c, int n) {
  Floats all = {}, kept = {};
  int j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    Store(w + j, MaskVector<kKeep, kGroup>(Load(w + j), Load(c + j), &all, &kept));
  }
  if (j < n) {
    StoreSome(
        w + j,
        MaskVector<kKeep, kGroup>(LoadSome(w + j, n - j), LoadSome(c + j, n - j), &all, &kept),
        n - j);
  }
  return {.all = Sum(all), .kept = Sum(kept)};
}

// Lanes of each four in another order.
template <int k0, int k1, int k2, int k3>
inline Ints Within4(Ints v) {
  return __builtin_shufflevector(v, v, k0, k1, k2, k3, 4 + k0, 4 + k1, 4 + k2, 4 + k3, 8 + k0,
                                 8 + k1, 8 + k2, 8 + k3, 12 + k0, 12 + k1, 12 + k2, 12 + k3);
}
inline Ints Less(Ints a, Ints b) { return a < b ? a : b; }
inline Ints More(Ints a, Ints b) { return a < b ? b : a; }
// A comparator between each lane of a four and its partner: the left of both takes the less.
template <int k0, int k1, int k2, int k3>
inline Ints Layer(Ints v) {
  const Ints other = Within4<k0, k1, k2, k3>(v);
  constexpr auto from = [](int i, int partner) { return i <= partner ? i : i + kLanes; };
  return __builtin_shufflevector(Less(v, other), More(v, other), from(0, k0), from(1, k1),
                                 from(2, k2), from(3, k3), 4 + from(0, k0), 4 + from(1, k1),
                                 4 + from(2, k2), 4 + from(3, k3), 8 + from(0, k0), 8 + from(1, k1),
                                 8 + from(2, k2), 8 + from(3, k3), 12 + from(0, k0),
                                 12 + from(1, k1), 12 + from(2, k2), 12 + from(3, k3));
}

// The fourth from above of each 8 lanes, in all of them: a network of comparators sorts both
// halves; of the two sorted ones the four greatest are the greater of each pair from opposite ends.
inline Ints FourthOf8(Ints v) {
  v = Layer<1, 0, 3, 2>(v);
  v = Layer<2, 3, 0, 1>(v);
  v = Layer<0, 2, 1, 3>(v);
  const Ints back =
      __builtin_shufflevector(v, v, 7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8);
  v = More(v, back);
  v = Less(v, Within4<1, 0, 3, 2>(v));
  return Less(v, Within4<2, 3, 0, 1>(v));
}

// Less work than comparing all pairs, but equal scores all stay: of a row that has such in a group,
// what then stays goes by pairs.
Saliency Mask48(float* w, const float* c, int n) {
  Floats all = {}, kept = {};
  Ints staying = {};
  int j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Floats values = Load(w + j);
    const Floats score = values * values * Load(c + j);
    const Ints stays = Bits(score) >= FourthOf8(Bits(score));
    all += score;
    kept += Where(stays, score);
    staying -= stays;
    Store(w + j, Where(stays, values));
  }
  int64_t count = 0;
  for (int i = 0; i < kLanes; ++i) count += staying[i];
  Saliency saliency = {.all = Sum(all), .kept = Sum(kept)};
  if (count != j / 2) saliency.kept = MaskGroups<4, 8>(w, c, j).kept;
  saliency += MaskGroups<4, 8>(w + j, c + j, n - j);
  return saliency;
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

int64_t Zeros(const float* w, int64_t n) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) count += w[j] == 0 ? 1 : 0;
  return count;
}

// The largest threshold that no more than `count` < n scores are below, and how many are; looked
// for from `next` on, if that is above 0.
struct Threshold {
  float at;
  int64_t below;
};
Threshold FindThreshold(const float* scores, int64_t n, int64_t count, float next) {
  const auto bits = [](float value) {
    uint32_t of;
    __builtin_memcpy(&of, &value, sizeof(of));
    return of;
  };
  const float infinity = __builtin_inff();
  float low = 0, high = infinity;
  int64_t below_low = 0, below_high = n;
  if (!(next > 0 && next < infinity)) {
    const int64_t some = n < 64 ? n : 64;
    next = 0;
    for (int64_t j = 0; j < some; ++j) next += scores[j] / static_cast<float>(some);
  }
  for (int turn = 0; below_low != count && bits(high) - bits(low) > 1; ++turn) {
    if (!(next > low && next < high) || turn % 8 == 7) {
      const uint32_t middle = bits(low) + (bits(high) - bits(low)) / 2;
      __builtin_memcpy(&next, &middle, sizeof(next));
    }
    const int64_t below = CountBelow(scores, n, next);
    (below <= count ? low : high) = next;
    (below <= count ? below_low : below_high) = below;
    // Near its median |w| is spread evenly, so counts go with roots of scores.
    if (low > 0 && high < infinity) {
      const float share =
          static_cast<float>(count - below_low) / static_cast<float>(below_high - below_low);
      const float root = __builtin_sqrtf(low);
      const float at = root + share * (__builtin_sqrtf(high) - root);
      next = at * at;
    } else if (below > 0) {  // a little beyond, for the other end
      float ratio = static_cast<float>(count) / static_cast<float>(below);
      ratio = ratio < 0.25f ? 0.25f : ratio > 4 ? 4 : ratio;
      ratio *= below <= count ? 1.03f : 0.97f;
      next *= ratio * ratio;
    } else {
      next = 0;
    }
  }
  return {low, below_low};
}

float ThresholdOf(const float* scores, int64_t n, int64_t count, float start) {
  return count < n ? FindThreshold(scores, n, count, start).at : __builtin_inff();
}

Saliency ZeroLeast(float* w, const float* scores, int64_t n, int64_t count, float* threshold) {
  if (count >= n) {
    Saliency saliency = ZeroBelow(w, scores, n, 0);
    for (int64_t j = 0; j < n; ++j) w[j] = 0;
    saliency.kept = 0;
    return saliency;
  }
  const Threshold found = FindThreshold(scores, n, count, *threshold);
  *threshold = found.at;
  Saliency saliency = ZeroBelow(w, scores, n, found.at);
  // What is left in between is all the same.
  for (int64_t j = 0, more = count - found.below; more > 0 && j < n; ++j) {
    if (scores[j] != found.at) continue;
    w[j] = 0;
    saliency.kept -= found.at;
    --more;
  }
  return saliency;
}

Saliency Settle(float* w, const float* original, const float* c, int n, int64_t count,
                float* scores, float* threshold) {
  Score(original, c, n, scores);
  const int64_t pruned = Zeros(w, n);
  // Weights of 0 are pruned either way.
  const bool too_many = pruned > count;
  if (pruned != count) {
    const Floats infinity = Floats{} + __builtin_inff();
    const auto settle = [&](int j, int some) {
      const Floats weights = LoadSome(w + j, some);
      const Ints in_question = too_many ? weights == 0 : weights != 0;
      StoreSome(scores + j, in_question ? LoadSome(scores + j, some) : infinity, some);
      if (too_many) StoreSome(w + j, LoadSome(original + j, some), some);
    };
    int j = 0;
    for (; j + kLanes <= n; j += kLanes) settle(j, kLanes);
    if (j < n) settle(j, n - j);
    ZeroLeast(w, scores, n, too_many ? count : count - pruned, threshold);
    Score(original, c, n, scores);
  }
  Floats all = {}, kept = {};
  const auto sum = [&](int j, int some) {
    const Floats score = LoadSome(scores + j, some);
    all += score;
    kept += Where(LoadSome(w + j, some) != 0, score);
  };
  int j = 0;
  for (; j + kLanes <= n; j += kLanes) sum(j, kLanes);
  if (j < n) sum(j, n - j);
  return {.all = Sum(all), .kept = Sum(kept)};
}

Saliency Ewma(const EwmaArgs& args) {
  Floats mean = {}, deviation = {}, all = {}, kept = {};
  Ints bit;  // of a column, in what each row loses
  for (int i = 0; i < kLanes; ++i) bit[i] = 1 << i;
  for (int begin = 0; begin < args.columns; begin += kLanes) {
    const int count = args.columns - begin < kLanes ? args.columns - begin : kLanes;
    Floats score[kLanes];
    LoadColumns(args.weights + begin, args.stride, args.rows, count, score);
    for (int j = 0; j < count; ++j) {
      score[j] = score[j] * score[j] * args.column_weights[begin + j];
    }
    if (begin == 0) {
      for (int j = 0; j < count; ++j) mean += score[j];
      mean /= static_cast<float>(count);
      for (int j = 0; j < count; ++j) deviation += Abs(score[j] - mean);
      deviation /= static_cast<float>(count);
    }
    Ints lost = {};
    const auto step = [&](int j) {
      const Floats off = score[j] - mean;
      const Ints goes = off < args.k * deviation;
      all += score[j];
      kept += Where(~goes, score[j]);
      lost |= goes & (1 << j);
      if (args.standing != nullptr) {
        constexpr float kFar = kFarStanding;
        Floats standing = off / deviation;
        // Below a mean that nothing deviates from is below it by any measure.
        standing = deviation == 0 ? (off < 0 ? Floats{} - kFar : Floats{} + kFar) : standing;
        standing = standing > -kFar ? standing : Floats{} - kFar;
        standing = standing < kFar ? standing : Floats{} + kFar;
        Store(args.standing + int64_t{begin + j} * kLanes, standing + kFar);
      }
      deviation = (1 - args.beta) * deviation + args.beta * Abs(off);
      mean += args.alpha * off;
    };
    if (count == kLanes) {
      for (int j = 0; j < kLanes; ++j) step(j);
    } else {
      for (int j = 0; j < count; ++j) step(j);
    }
    if (args.standing != nullptr) continue;
    for (int r = 0; r < args.rows; ++r) {
      float* const row = args.weights + r * args.stride + begin;
      const Ints stays = (bit & lost[r]) == 0;
      if (count == kLanes) {
        Store(row, Where(stays, Load(row)));
      } else {
        StoreSome(row, Where(stays, LoadSome(row, count)), count);
      }
    }
  }
  Saliency sums;
  for (int r = 0; r < args.rows; ++r) sums += {.all = all[r], .kept = kept[r]};
  return sums;
}

void AddMoments(const float* x, int64_t stride, int rows, int n, float* sums, float* squares) {
  const auto add = [&](int j, int count) {
    Floats sum = LoadSome(sums + j, count), square = LoadSome(squares + j, count);
    for (int r = 0; r < rows; ++r) {
      const float* const from = x + r * stride + j;
      const Floats values = count == kLanes ? Load(from) : LoadSome(from, count);
      sum += values;
      square += values * values;
    }
    StoreSome(sums + j, sum, count);
    StoreSome(squares + j, square, count);
  };
  int j = 0;
  for (; j + kLanes <= n; j += kLanes) add(j, kLanes);
  if (j < n) add(j, n - j);
}

void AddBlock(const float* x, const float* y, int64_t stride, int rows, float* sums) {
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
      const float* const row = x + r * stride + a;
      for (int v = 0; v < kRegisters; ++v) {
        const Floats values = Load(y + r * stride + v * kLanes);
        for (int i = 0; i < kAtOnce; ++i) sum[i][v] += row[i] * values;
      }
    }
    for (int i = 0; i < kAtOnce; ++i) {
      for (int v = 0; v < kRegisters; ++v) {
        Store(sums + (a + i) * kMomentBlock + v * kLanes, sum[i][v]);
      }
    }
  }
}

void ObsRows(const ObsArgs& args) {
  // Lanes are rows. Columns are brought up to date when it is their turn, with all errors so far:
  // a sum in registers, where sending each error to all later columns would be loads and stores.
  Floats w[kObsWidth], error[kObsWidth], score[kMaxGroup];
  Ints lost[kMaxGroup];
  float one_over[kObsWidth];
  const int width = args.width;
  for (int j = 0; j < width; j += kLanes) {
    LoadColumns(args.weights + j, args.stride, args.rows, width - j < kLanes ? width - j : kLanes,
                w + j);
  }
  for (int j = 0; j < width; ++j) one_over[j] = 1 / args.factor[j * kObsWidth + j];
  const int step = args.pruned != nullptr ? 4 : args.group;
  for (int begin = 0; begin < width; begin += step) {
    const int size = width - begin < step ? width - begin : step;
    int done = 0;
    for (; done + 4 <= size; done += 4) {
      Floats sum[4] = {};
      for (int i = 0; i < begin; ++i) {
        const float* const u = args.factor + i * kObsWidth + begin + done;
        for (int o = 0; o < 4; ++o) sum[o] += error[i] * u[o];
      }
      for (int o = 0; o < 4; ++o) w[begin + done + o] -= sum[o];
    }
    for (; done < size; ++done) {
      for (int i = 0; i < begin; ++i) {
        w[begin + done] -= error[i] * args.factor[i * kObsWidth + begin + done];
      }
    }
    if (args.pruned == nullptr) {
      for (int i = 0; i < size; ++i) {
        score[i] = w[begin + i] * one_over[begin + i];
        score[i] *= score[i];
        lost[i] = Ints{};
      }
      for (int i = 0; i < size; ++i) {
        for (int o = i + 1; o < size; ++o) {
          const Ints later_wins = score[o] >= score[i];
          lost[i] -= later_wins;
          lost[o] -= ~later_wins;
        }
      }
    }
    for (int i = 0; i < size; ++i) {
      const int j = begin + i;
      Ints goes;
      if (args.pruned == nullptr) {
        goes = lost[i] >= args.keep;
      } else {
        for (int r = 0; r < kLanes; ++r) {
          goes[r] = r < args.rows && args.pruned[r * args.pruned_stride + j] != 0 ? -1 : 0;
        }
      }
      // Of its own group.
      for (int o = begin; o < j; ++o) w[j] -= error[o] * args.factor[o * kObsWidth + j];
      error[j] = Where(goes, w[j] * one_over[j]);
      w[j] = Where(~goes, w[j]);
    }
  }
  for (int j = 0; j < width; j += kLanes) {
    const int count = width - j < kLanes ? width - j : kLanes;
    for (int o = count; o < kLanes; ++o) w[j + o] = error[j + o] = Floats{};
    StoreColumns(w + j, args.weights + j, args.stride, args.rows, count);
    if (args.errors == nullptr) continue;
    StoreColumns(error + j, args.errors + j, args.width, args.rows, count);
  }
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
    .mask_4_8 = Mask48,
    .threshold_of = ThresholdOf,
    .zero_least = ZeroLeast,
    .settle = Settle,
    .ewma = Ewma,
    .add_moments = AddMoments,
    .add_block = AddBlock,
    .obs_rows = ObsRows,
    .dot = Dot,
    .sum_kept = SumKept,
    .add_kept = AddKept,
    .zeros = Zeros,
    .first_not_finite = FirstNotFinite,
};
