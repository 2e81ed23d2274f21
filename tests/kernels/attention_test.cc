// Rotation, KV pages and attention against their references, with pages that hold rubbish wherever
// no token was written.
#include <bit>
#include <cmath>
#include <numeric>

#include "tests/kernels/kernel_cases.h"

namespace espalier {
namespace {

// How pages keep what they keep.
struct Pages {
  KvType type = KvType::kF32;
  bool int4 = false;
};

float FromHalf(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                        : std::ldexp(1024.0f + fraction, exponent - 25);
  return half >> 15 != 0 ? -magnitude : magnitude;
}

// x times the Hadamard matrix of `run` numbers, by its definition: the sign of (i, j) is the parity
// of the bits that i and j share.
void Spread(std::span<float> x, size_t run) {
  for (size_t at = 0; at < x.size(); at += run) {
    const std::vector<float> from(x.begin() + at, x.begin() + at + run);
    for (size_t i = 0; i < run; ++i) {
      double sum = 0;
      for (size_t j = 0; j < run; ++j) sum += std::popcount(i & j) % 2 == 0 ? from[j] : -from[j];
      x[at + i] = static_cast<float>(sum / std::sqrt(static_cast<double>(run)));
    }
  }
}

// A few sequences in one pool, and a model's worth of heads over them.
class Sequences {
 public:
  struct Heads {
    int heads, kv_heads, dim;
  };

  Sequences(Backend* backend, Heads heads, Pages kept, int sequences, int tokens)
      : backend_(backend), heads_(heads), int4_(kept.int4) {
    const int page_tokens = kept.int4 ? kInt4PageTokens : kPageTokens;
    const int pages = (tokens + page_tokens - 1) / page_tokens;
    pool_ = backend
                ->CreateKvPool({.type = kept.type,
                                .pages = pages * sequences,
                                .kv_heads = heads.kv_heads,
                                .head_dim = heads.dim})
                .value();
    std::memset(pool_.data, 0xff, pool_.shape.page_bytes() * pool_.shape.pages);  // all NaN
    for (int s = 0; s < sequences; ++s) {
      tables_.emplace_back(pages);
      for (int p = 0; p < pages; ++p) tables_[s][p] = (p * sequences + s) * 5 % (pages * sequences);
      if ((pages * sequences) % 5 == 0) {
        for (int p = 0; p < pages; ++p) tables_[s][p] = p * sequences + s;
      }
      q_.push_back(RandomValues(int64_t{tokens} * heads.heads * heads.dim, 10 * s + 1));
      k_.push_back(RandomValues(int64_t{tokens} * heads.kv_heads * heads.dim, 10 * s + 2));
      v_.push_back(RandomValues(int64_t{tokens} * heads.kv_heads * heads.dim, 10 * s + 3));
    }
    if (kept.int4) key_mean_ = RandomValues(heads.kv_heads * heads.dim, 77);
    // Slow turning, so that what is compared is attention.
    for (int i = 0; i < heads.dim / 2; ++i) {
      frequency_.push_back(std::pow(100.0f, -2.0f * i / heads.dim));
    }
  }

  struct Chunk {
    int sequence, start, rows;
  };

  // One step of the chunks: rotates, stores and attends; returns [rows, kept heads * dim].
  std::vector<float> Step(const std::vector<Chunk>& chunks, std::span<const int32_t> kept,
                          RopePairing pairing = RopePairing::kInterleaved) {
    const int dim = heads_.dim, kv_width = heads_.kv_heads * dim,
              width = static_cast<int>(kept.size()) * dim;
    std::vector<AttentionSpan> spans;
    std::vector<std::span<const int32_t>> tables;
    std::vector<float> q, k, v;
    int rows = 0;
    for (const Chunk& chunk : chunks) {
      spans.push_back(
          {.first_row = rows, .rows = chunk.rows, .start = chunk.start, .int4_kv = int4_});
      tables.push_back(tables_[chunk.sequence]);
      rows += chunk.rows;
      for (int t = chunk.start; t < chunk.start + chunk.rows; ++t) {
        for (const int32_t head : kept) {
          const auto from = q_[chunk.sequence].begin() + (int64_t{t} * heads_.heads + head) * dim;
          q.insert(q.end(), from, from + dim);
        }
        const int64_t at = int64_t{t} * kv_width;
        k.insert(k.end(), &k_[chunk.sequence][at], &k_[chunk.sequence][at] + kv_width);
        v.insert(v.end(), &v_[chunk.sequence][at], &v_[chunk.sequence][at] + kv_width);
      }
    }
    RopeAndStoreArgs args = {.spans = spans,
                             .page_tables = tables,
                             .q = Matrix(q.data(), rows, width),
                             .k = Matrix(k.data(), rows, kv_width),
                             .v = ConstMatrix(v.data(), rows, kv_width),
                             .inverse_frequency = frequency_,
                             .pairing = pairing,
                             .key_mean = key_mean_,
                             .pool = &pool_};
    if (apart_) {  // K and V beside queries that nobody wants
      std::vector<float> other(q.size(), NAN);
      args.q = Matrix(other.data(), rows, width);
      backend_->RopeAndStore(args);
      args.q = Matrix(q.data(), rows, width);
      args.k = Matrix(k.data(), rows, 0);
      args.v = ConstMatrix(v.data(), rows, 0);
    }
    backend_->RopeAndStore(args);
    std::vector<float> out(q.size(), NAN);
    backend_->Attention({.spans = spans,
                         .page_tables = tables,
                         .q = ConstMatrix(q.data(), rows, width),
                         .heads_kept = kept,
                         .heads = heads_.heads,
                         .scale = 1 / std::sqrt(static_cast<float>(dim)),
                         .pool = &pool_,
                         .out = Matrix(out.data(), rows, width)});
    return out;
  }

  // What Step should give for one chunk.
  std::vector<double> Expected(const Chunk& chunk, std::span<const int32_t> kept,
                               RopePairing pairing) const {
    const int end = chunk.start + chunk.rows;
    std::vector<int32_t> positions(end);
    std::iota(positions.begin(), positions.end(), 0);
    const auto rotated = [&](const std::vector<float>& x, int heads) {
      const auto wide =
          reference::Rotate(View(x, end, heads * heads_.dim), positions, frequency_, pairing);
      return std::vector<float>(wide.begin(), wide.end());
    };
    const std::vector<float> q = rotated(q_[chunk.sequence], heads_.heads);
    std::vector<float> k = rotated(k_[chunk.sequence], heads_.kv_heads);
    std::vector<float> v = v_[chunk.sequence];
    if (pool_.shape.type == KvType::kF16) {
      for (float& each : k) each = reference::RoundToHalf(each);
      for (float& each : v) each = reference::RoundToHalf(each);
    }
    if (pool_.shape.type == KvType::kInt8) {
      for (std::vector<float>* values : {&k, &v}) {
        for (size_t at = 0; at < values->size(); at += heads_.dim) {
          const auto q8 = reference::Quantize(std::span(*values).subspan(at, heads_.dim));
          for (int d = 0; d < heads_.dim; ++d) (*values)[at + d] = q8.scale * q8.values[d];
        }
      }
    }
    if (int4_) ReadInt4(chunk.sequence, end, &k, &v);
    std::vector<double> want;
    for (int t = chunk.start; t < end; ++t) {
      std::vector<float> row;
      for (const int32_t head : kept) {
        const auto from = q.begin() + (int64_t{t} * heads_.heads + head) * heads_.dim;
        row.insert(row.end(), from, from + heads_.dim);
      }
      const auto one =
          reference::Attention(row, kept, heads_.heads, heads_.kv_heads, heads_.dim,
                               1 / std::sqrt(static_cast<double>(heads_.dim)), k, v, t + 1);
      want.insert(want.end(), one.begin(), one.end());
    }
    return want;
  }

  const KvPool& pool() const { return pool_; }
  // From now on, K and V are stored first and queries rotated afterwards.
  void RotateApart() { apart_ = true; }

  // From now on, pages of bytes are what pages of int4 were not yet.
  void Pack(int sequence, const std::vector<KvPacking>& packings, std::vector<int32_t> table) {
    if (key_mean_.empty()) key_mean_ = RandomValues(heads_.kv_heads * heads_.dim, 77);
    backend_->PackKv({.packings = packings, .key_mean = key_mean_, .pool = &pool_});
    tables_[sequence] = std::move(table);
    int4_ = true;
  }
  const std::vector<int32_t>& table(int sequence) const { return tables_[sequence]; }

  // K, with what its heads share, and V of the first `tokens`, from int4 pages.
  void ReadInt4(int sequence, int tokens, std::vector<float>* k, std::vector<float>* v) const {
    const int dim = heads_.dim;
    k->clear();
    v->clear();
    for (int t = 0; t < tokens; ++t) {
      const std::byte* page =
          pool_.data + tables_[sequence][t / kInt4PageTokens] * pool_.shape.page_bytes();
      const int half = t % kInt4PageTokens / kPageTokens, slot = t % kPageTokens;
      for (int part = 0; part < 2 * heads_.kv_heads; ++part) {
        const bool keys = part < heads_.kv_heads;
        const std::byte* head = page + part * pool_.shape.head_bytes();
        const float scale = FromHalf(reinterpret_cast<const uint16_t*>(head)[t % kInt4PageTokens]);
        const auto* values = reinterpret_cast<const uint8_t*>(head + 2 * kInt4PageTokens) +
                             half * kPageTokens * dim / 2;
        std::vector<float> x(dim);
        for (int d = 0; d < dim; ++d) {
          const int low = std::min(32, dim - d / 32 * 32) / 2;  // of V: dimensions in low bits
          const int byte = keys ? (d / 8 * kPageTokens + slot) * 4 + d % 4
                                : slot * dim / 2 + d / 32 * 16 + d % 32 % low;
          const bool high = keys ? d % 8 >= 4 : d % 32 >= low;
          x[d] = scale * (2 * (high ? values[byte] >> 4 : values[byte] & 15) - 15);
        }
        Spread(x, dim & -dim);
        for (int d = 0; keys && d < dim; ++d) x[d] += key_mean_[part * dim + d];
        (keys ? k : v)->insert((keys ? k : v)->end(), x.begin(), x.end());
      }
    }
  }

  // K, rotated, and V as they were given.
  void Given(int sequence, int tokens, RopePairing pairing, std::vector<float>* k,
             std::vector<float>* v) const {
    std::vector<int32_t> positions(tokens);
    std::iota(positions.begin(), positions.end(), 0);
    const int width = heads_.kv_heads * heads_.dim;
    const auto wide =
        reference::Rotate(View(k_[sequence], tokens, width), positions, frequency_, pairing);
    k->assign(wide.begin(), wide.end());
    v->assign(v_[sequence].begin(), v_[sequence].begin() + int64_t{tokens} * width);
  }

  // Of what Step will store.
  void SetValue(int sequence, int token, float value) {
    const int width = heads_.kv_heads * heads_.dim;
    std::fill_n(v_[sequence].begin() + int64_t{token} * width, width, value);
  }

 private:
  Backend* backend_;
  const Heads heads_;
  bool int4_;
  bool apart_ = false;
  std::vector<float> key_mean_;
  KvPool pool_;
  std::vector<std::vector<int32_t>> tables_;
  std::vector<std::vector<float>> q_, k_, v_;
  std::vector<float> frequency_;
};

struct AttentionCase {
  Isa isa;
  KvType type;
  bool int4 = false;

  Pages pages() const { return {.type = type, .int4 = int4}; }
};

std::vector<AttentionCase> AllCases() {
  std::vector<AttentionCase> cases;
  for (Isa isa : SupportedIsas()) {
    for (KvType type : {KvType::kF32, KvType::kF16, KvType::kInt8}) cases.push_back({isa, type});
    cases.push_back({isa, KvType::kInt8, /*int4=*/true});
  }
  return cases;
}

class AttentionTest : public ::testing::TestWithParam<AttentionCase> {
 protected:
  // fp32 differs by the order of sums, through an exponential. Of fp16 and int8 pages a rotated key
  // may be rounded the other way than the reference's, whose last bit differs.
  static double Tolerance() { return GetParam().type == KvType::kF32 ? 6e-6 : 2e-3; }

  std::unique_ptr<Backend> backend_ = MakeBackend(GetParam().isa);
};

INSTANTIATE_TEST_SUITE_P(Isa, AttentionTest, ::testing::ValuesIn(AllCases()),
                         [](const ::testing::TestParamInfo<AttentionCase>& info) {
                           return fmt::format(
                               "{}_{}", IsaName(info.param.isa),
                               info.param.int4 ? "int4" : KvTypeName(info.param.type));
                         });

TEST_P(AttentionTest, MatchesReference) {
  const Sequences::Heads shapes[] = {{1, 1, 2},  {3, 1, 10}, {4, 4, 16},  {9, 3, 64},
                                     {6, 2, 80}, {2, 2, 32}, {40, 1, 16}, {4, 2, 128}};
  int turn = 0;
  for (const Sequences::Heads& heads : shapes) {
    if (GetParam().int4 && heads.dim % 8 != 0) continue;
    for (const auto& [name, kept] : RowLists(heads.heads)) {
      const RopePairing pairing =
          ++turn % 2 == 0 ? RopePairing::kInterleaved : RopePairing::kHalfSplit;
      Sequences sequences(backend_.get(), heads, GetParam().pages(), 3, 70);
      // A first step brings prompts of awkward lengths, the second decodes and prefills on.
      const std::vector<std::vector<Sequences::Chunk>> steps = {
          {{0, 0, 15}, {1, 0, 33}, {2, 0, 1}},
          {{0, 15, 1}, {1, 33, 37}, {2, 1, 16}},
          {{2, 17, 1}, {0, 16, 1}},
      };
      for (const auto& chunks : steps) {
        const std::vector<float> out = sequences.Step(chunks, kept, pairing);
        size_t at = 0;
        for (const Sequences::Chunk& chunk : chunks) {
          const size_t size = size_t{1} * chunk.rows * kept.size() * heads.dim;
          ExpectNear(
              std::span(out).subspan(at, size), sequences.Expected(chunk, kept, pairing),
              Tolerance(), static_cast<int>(kept.size()) * heads.dim,
              fmt::format("{} heads over {} of {}, kept {}, sequence {} from {}", heads.heads,
                          heads.kv_heads, heads.dim, name, chunk.sequence, chunk.start));
          at += size;
        }
      }
    }
  }
}

// Where one task is all heads of a sequence, over several blocks of pages.
TEST_P(AttentionTest, ManySequencesDecodeTogether) {
  const Sequences::Heads heads{9, 3, 64};
  constexpr int kSequences = 8, kWidth = 9 * 64;
  const std::vector<int32_t> all = Natural(9);
  Sequences sequences(backend_.get(), heads, GetParam().pages(), kSequences, 210);
  std::vector<Sequences::Chunk> chunks;
  for (int s = 0; s < kSequences; ++s) {
    const int tokens = 125 + 11 * s;  // 126 to 203 with the next
    sequences.Step({{s, 0, tokens}}, all);
    chunks.push_back({s, tokens, 1});
  }
  const std::vector<float> out = sequences.Step(chunks, all);
  for (int s = 0; s < kSequences; ++s) {
    ExpectNear(std::span(out).subspan(size_t{1} * s * kWidth, kWidth),
               sequences.Expected(chunks[s], all, RopePairing::kInterleaved), Tolerance(), kWidth,
               fmt::format("sequence {}", s));
  }
}

TEST_P(AttentionTest, ChunksAndCrowdsGiveTheSameBits) {
  for (const Sequences::Heads& heads :
       {Sequences::Heads{9, 3, 64}, Sequences::Heads{5, 1, GetParam().int4 ? 24 : 10}}) {
    const std::vector<int32_t> all = Natural(heads.heads);
    constexpr int kTokens = 75;
    const auto fresh = [&](Backend* backend) {
      return Sequences(backend, heads, GetParam().pages(), 3, kTokens);
    };
    const std::vector<float> whole = fresh(backend_.get()).Step({{0, 0, kTokens}}, all);

    const auto alone = MakeBackend(GetParam().isa, 1);
    EXPECT_TRUE(BitEqual(whole, fresh(alone.get()).Step({{0, 0, kTokens}}, all))) << "one thread";
    EXPECT_TRUE(BitEqual(whole,
                         [&] {
                           std::vector<float> out =
                               fresh(backend_.get()).Step({{0, 0, kTokens}, {1, 0, 40}}, all);
                           out.resize(whole.size());
                           return out;
                         }()))
        << "with a neighbour";

    for (int size : {1, 7, 16, 17}) {
      Sequences sequences = fresh(backend_.get());
      std::vector<float> chunked;
      for (int start = 0; start < kTokens; start += size) {
        const Sequences::Chunk mine{0, start, std::min(size, kTokens - start)};
        const std::vector<float> out = sequences.Step({{1, start, 1}, mine}, all);
        chunked.insert(chunked.end(), out.begin() + heads.heads * heads.dim, out.end());
      }
      EXPECT_TRUE(BitEqual(whole, chunked)) << "chunks of " << size;
    }
  }
}

TEST_P(AttentionTest, QueriesMayBeRotatedApart) {
  const std::vector<int32_t> kept = {0, 2, 5};
  const auto run = [&](bool apart) {
    Sequences sequences(backend_.get(), {6, 2, 80}, GetParam().pages(), 2, 40);
    if (apart) sequences.RotateApart();
    std::vector<float> all = sequences.Step({{0, 0, 31}, {1, 0, 7}}, kept);
    const std::vector<float> next = sequences.Step({{0, 31, 1}, {1, 7, 9}}, kept);
    all.insert(all.end(), next.begin(), next.end());
    return all;
  };
  EXPECT_EQ(run(true), run(false));
}

// Nor does a fault in a token behind them.
TEST_P(AttentionTest, FaultsAreSeenOnlyFromTheirTokenOn) {
  const Sequences::Heads heads{9, 3, 64};
  const std::vector<int32_t> all = Natural(9);
  constexpr int kTokens = 75, kWidth = 9 * 64;
  const std::vector<float> clean =
      Sequences(backend_.get(), heads, GetParam().pages(), 1, kTokens).Step({{0, 0, kTokens}}, all);
  for (const int token : {1, 20, 63, 66}) {
    for (const float fault : {NAN, INFINITY}) {
      Sequences sequences(backend_.get(), heads, GetParam().pages(), 1, kTokens);
      sequences.SetValue(0, token, fault);
      const std::vector<float> out = sequences.Step({{0, 0, kTokens}}, all);
      EXPECT_TRUE(
          BitEqual(std::span(out).first(token * kWidth), std::span(clean).first(token * kWidth)))
          << fault << " in token " << token;
      const bool saturates = GetParam().type == KvType::kF16 && std::isinf(fault);
      EXPECT_EQ(std::isfinite(out[token * kWidth]), saturates) << fault << " in token " << token;
    }
  }
}

// A dropped head must not change what the others read.
TEST_P(AttentionTest, KeptHeadsGiveTheBitsTheyGiveAmongAll) {
  const Sequences::Heads heads{9, 3, 64};
  Sequences everyone(backend_.get(), heads, GetParam().pages(), 1, 40);
  Sequences few(backend_.get(), heads, GetParam().pages(), 1, 40);
  const std::vector<int32_t> list = {7, 0, 2};
  const std::vector<float> all = everyone.Step({{0, 0, 40}}, Natural(9));
  const std::vector<float> kept = few.Step({{0, 0, 40}}, list);
  for (int r = 0; r < 40; ++r) {
    for (int i = 0; i < 3; ++i) {
      EXPECT_TRUE(BitEqual(std::span(kept).subspan((r * 3 + i) * 64, 64),
                           std::span(all).subspan((r * 9 + list[i]) * 64, 64)));
    }
  }
}

// Values as they lie in the page, over all of fp16's range: rounding to even, subnormals, bounds.
TEST_P(AttentionTest, StoresValuesRoundedAndBounded) {
  if (GetParam().int4) GTEST_SKIP() << "Int4Pages";
  constexpr int kDim = 64;
  std::vector<float> v = {0.0f,     -0.0f,   1.0f,  1.00048828125f, 1.0014648f,    65504.0f,
                          65519.9f, 65520,   1e9f,  -INFINITY,      5.9604645e-8f, 2.98e-8f,
                          2.9e-8f,  8.9e-8f, 6e-5f, 6.1e-5f,        -3.05e-5f,     1e-12f};
  const auto noise = RandomValues(kDim * 4, 9);
  while (v.size() < kDim * 4) v.push_back(noise[v.size()] * std::exp2(30.0f * noise[v.size() - 1]));
  KvPool pool =
      backend_->CreateKvPool({.type = GetParam().type, .pages = 1, .kv_heads = 4, .head_dim = kDim})
          .value();
  std::vector<float> k(v.size()), q(v.size());
  const std::vector<float> frequency(kDim / 2, 1.0f);
  const std::vector<AttentionSpan> spans = {{.first_row = 0, .rows = 1, .start = 5}};
  const std::vector<int32_t> pages = {0};
  const std::vector<std::span<const int32_t>> tables = {pages};
  backend_->RopeAndStore({.spans = spans,
                          .page_tables = tables,
                          .q = Matrix(q.data(), 1, 4 * kDim),
                          .k = Matrix(k.data(), 1, 4 * kDim),
                          .v = ConstMatrix(v.data(), 1, 4 * kDim),
                          .inverse_frequency = frequency,
                          .pool = &pool});
  const std::byte* values = pool.data + pool.shape.page_bytes() / 2;
  if (GetParam().type == KvType::kInt8) {
    for (int h = 0; h < 4; ++h) {
      const std::byte* head = values + h * pool.shape.head_bytes();
      const float scale = reinterpret_cast<const float*>(head)[5];
      const std::span<const float> wanted = std::span(v).subspan(h * kDim, kDim);
      const bool finite =
          std::all_of(wanted.begin(), wanted.end(), [](float each) { return std::isfinite(each); });
      EXPECT_EQ(std::isfinite(scale), finite) << "a fault must be seen";
      const auto* stored = reinterpret_cast<const int8_t*>(head + kPageTokens * sizeof(float));
      for (int d = 0; finite && d < kDim; ++d) {
        EXPECT_NEAR(scale * stored[5 * kDim + d], wanted[d], 0.5001f * scale);
      }
    }
    return;
  }
  for (int i = 0; i < 4 * kDim; ++i) {
    const int at = (i / kDim * kPageTokens + 5) * kDim + i % kDim;
    if (GetParam().type == KvType::kF32) {
      EXPECT_EQ(reinterpret_cast<const float*>(values)[at], v[i]);
      continue;
    }
    EXPECT_EQ(FromHalf(reinterpret_cast<const uint16_t*>(values)[at]), reference::RoundToHalf(v[i]))
        << v[i];
  }
}

// How far int4 pages are from what was given, as a share of its energy.
double Int4Error(const Sequences& sequences, int sequence, int tokens) {
  std::vector<float> k, v, want_k, want_v;
  sequences.ReadInt4(sequence, tokens, &k, &v);
  sequences.Given(sequence, tokens, RopePairing::kInterleaved, &want_k, &want_v);
  double error = 0, energy = 0;
  for (const auto& [got, want] : {std::pair(&k, &want_k), std::pair(&v, &want_v)}) {
    EXPECT_EQ(got->size(), want->size());
    for (size_t i = 0; i < got->size(); ++i) {
      error += std::pow((*got)[i] - (*want)[i], 2);
      energy += std::pow((*want)[i], 2);
    }
  }
  return error / energy;
}

// Sixteen levels leave 1.2 % of the energy of what is normally distributed, at the best scale of
// all. (Keys have their mean's energy, too.)
TEST_P(AttentionTest, Int4PagesHoldWhatTheyWereGiven) {
  if (!GetParam().int4) GTEST_SKIP();
  for (const Sequences::Heads& heads :
       {Sequences::Heads{9, 3, 64}, Sequences::Heads{4, 2, 128}, Sequences::Heads{2, 1, 40}}) {
    Sequences sequences(backend_.get(), heads, GetParam().pages(), 1, 90);
    sequences.Step({{0, 0, 90}}, Natural(heads.heads));
    EXPECT_LT(Int4Error(sequences, 0, 90), 0.018) << heads.dim;
  }
}

// In place, into another page, with an odd page at the end; then the sequence goes on.
TEST_P(AttentionTest, Int8PagesBecomeInt4Pages) {
  if (!GetParam().int4) GTEST_SKIP();
  const Sequences::Heads heads{9, 3, 64};
  const std::vector<int32_t> all = Natural(9);
  constexpr int kTokens = 75, kWidth = 9 * 64;  // five pages
  Sequences sequences(backend_.get(), heads, {.type = KvType::kInt8}, 2, 128);
  sequences.Step({{0, 0, kTokens}}, all);
  const std::vector<int32_t> pages = sequences.table(0), others = sequences.table(1);
  sequences.Pack(
      0,
      {{pages[0], pages[1], pages[0]}, {pages[2], pages[3], others[0]}, {pages[4], -1, pages[4]}},
      {pages[0], others[0], pages[4]});
  EXPECT_LT(Int4Error(sequences, 0, kTokens), 0.018);
  for (int token = kTokens; token < 80; ++token) {
    const Sequences::Chunk next{0, token, 1};
    const std::vector<float> out = sequences.Step({next}, all);
    ExpectNear(out, sequences.Expected(next, all, RopePairing::kInterleaved), Tolerance(), kWidth,
               fmt::format("token {}", token));
  }
  EXPECT_LT(Int4Error(sequences, 0, 80), 0.018);

  // The second of two may be where they go.
  Sequences again(backend_.get(), heads, {.type = KvType::kInt8}, 1, 128);
  again.Step({{0, 0, 20}}, all);
  const std::vector<int32_t> own = again.table(0);
  again.Pack(0, {{own[0], own[1], own[1]}}, {own[1]});
  EXPECT_LT(Int4Error(again, 0, 20), 0.018);
}

TEST_P(AttentionTest, PoolSaysWhatIsWrong) {
  const auto make = [&](int pages, int kv_heads, int dim) {
    return backend_
        ->CreateKvPool(
            {.type = GetParam().type, .pages = pages, .kv_heads = kv_heads, .head_dim = dim})
        .status();
  };
  EXPECT_TRUE(make(0, 1, 2).ok());
  EXPECT_EQ(make(1, 1, 3).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(make(-1, 1, 2).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(make(1, 0, 2).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(make(INT_MAX, 1 << 20, 1 << 20).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(make(INT_MAX, 64, 128).code(), absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace espalier
