#include "engine/model/pruning_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <string>

#include "engine/model/own_file.h"
#include "tests/support/model_writer.h"

namespace espalier {
namespace {

using testing::ElementsAre;
using testing::ElementsAreArray;
using testing::HasSubstr;

// Two layers of 64 channels and hidden 16, with one tensor to tell it by.
class SmallModel : public ModelFile {
 public:
  explicit SmallModel(std::string_view values = "abcdefgh") : values_(values) {
    path_ = "small";
    config_.layers = 2;
    config_.hidden = 16;
    config_.heads = 2;
    config_.kv_heads = 1;
    config_.head_dim = 8;
    config_.channels = 64;
    tensors_.push_back({.name = "t",
                        .cols = static_cast<int>(values_.size() / 4),
                        .data = reinterpret_cast<const std::byte*>(values_.data()),
                        .bytes = values_.size()});
  }

 private:
  std::string values_;
};

std::vector<int32_t> Turned(int count) {
  std::vector<int32_t> ranking(count);
  std::iota(ranking.rbegin(), ranking.rend(), 0);
  return ranking;
}

PruningData SomeData() {
  PruningData data;
  data.layers.resize(2);
  data.layers[1].ranking = Turned(64);
  data.layers[0].heads = Turned(2);
  for (const int count : {32, 64}) {
    std::vector<FourBitGroup>& groups = data.layers[1].refits[count].down;
    for (int i = 0; i < 16 * count / kQuantGroup; ++i) {
      groups.push_back({.scale = static_cast<uint16_t>(i), .minimum = 7, .u = {1, 2, 3}});
    }
  }
  data.layers[1].refits[64].bias.assign(16, 0.5f);
  data.layers[0].key_mean.assign(8, -0.25f);
  return data;
}

TEST(PruningFile, IsReadAsItWasWritten) {
  const TemporaryFolder folder;
  const SmallModel model;
  const PruningData data = SomeData();
  const std::string path = folder.Path("m.ladder.gguf");
  ASSERT_TRUE(WritePruningFile(path, model, data).ok());
  const auto file = PruningFile::Open(path, model);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_THAT((*file)->Ranking(1, SiteKind::kChannels), ElementsAreArray(Turned(64)));
  EXPECT_EQ((*file)->Ranking(0, SiteKind::kChannels)[5], 5) << "natural where nothing is said";
  EXPECT_THAT((*file)->Ranking(0, SiteKind::kHeads), ElementsAre(1, 0));
  EXPECT_THAT((*file)->Ranking(1, SiteKind::kHeads), ElementsAre(0, 1));
  for (const auto& [count, refit] : data.layers[1].refits) {
    const std::vector<FourBitGroup>& groups = refit.down;
    const auto read = (*file)->RefitOf(1, count).down;
    EXPECT_THAT((*file)->RefitOf(1, count).bias, ElementsAreArray(refit.bias));
    ASSERT_EQ(read.size(), groups.size());
    for (size_t i = 0; i < groups.size(); ++i) {
      EXPECT_EQ(read[i].scale, groups[i].scale);
      EXPECT_EQ(read[i].minimum, groups[i].minimum);
      EXPECT_THAT(read[i].u, ElementsAreArray(groups[i].u));
    }
  }
  EXPECT_THAT((*file)->KeyMean(0), ElementsAreArray(data.layers[0].key_mean));
  EXPECT_TRUE((*file)->KeyMean(1).empty());
  EXPECT_TRUE((*file)->RefitOf(0, 32).down.empty());
  EXPECT_TRUE((*file)->RefitOf(1, 48).down.empty());
}

TEST(PruningFile, IsOfOneModel) {
  const TemporaryFolder folder;
  const std::string path = folder.Path("p.gguf");
  ASSERT_TRUE(WritePruningFile(path, SmallModel(), SomeData()).ok());
  const auto file = PruningFile::Open(path, SmallModel("abcdefgX"));
  EXPECT_EQ(file.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(file.status().message()), HasSubstr("p.gguf: made for another model"));
}

std::string Fault(const GgufParts& parts) {
  const TemporaryFolder folder;
  const auto file = PruningFile::Open(folder.Write("p.gguf", parts.Bytes()), SmallModel());
  return std::string(file.status().message());
}

GgufParts SomeParts() {
  GgufParts parts;
  parts.Set("general.architecture", GgufPart::Text("espalier-pruning"));
  parts.Set("espalier.fingerprint", GgufPart::Text(FingerprintOf(SmallModel())));
  parts.Set("espalier.ranking.1", GgufPart::Integers(Turned(64)));
  parts.tensors.push_back({.name = "blk.1.ffn_down.32.weight",
                           .dims = {32, 16},
                           .type = 3,
                           .data = std::string(16 * sizeof(FourBitGroup), '\0')});
  parts.tensors.push_back(
      {.name = "blk.0.attn_k.mean", .dims = {8}, .type = 0, .data = std::string(32, '\0')});
  return parts;
}

TEST(PruningFile, SaysWhatIsWrongWithIt) {
  EXPECT_EQ(Fault(SomeParts()), "");
  const auto after = [](auto change) {
    GgufParts parts = SomeParts();
    change(parts);
    return Fault(parts);
  };
  EXPECT_THAT(after([](GgufParts& p) { p.Set("general.architecture", GgufPart::Text("llama")); }),
              HasSubstr("general.architecture: expected espalier-pruning, got \"llama\""));
  EXPECT_THAT(after([](GgufParts& p) { p.Remove("espalier.fingerprint"); }),
              HasSubstr("espalier.fingerprint"));
  for (const std::vector<int32_t>& ranking :
       {std::vector<int32_t>{}, std::vector<int32_t>(64, 3), Turned(63), Turned(65)}) {
    EXPECT_THAT(
        after([&](GgufParts& p) { p.Set("espalier.ranking.1", GgufPart::Integers(ranking)); }),
        HasSubstr("espalier.ranking.1"));
  }
  for (const std::vector<int32_t>& heads : {std::vector<int32_t>{0, 0}, {0}, {1, 2}}) {
    EXPECT_THAT(after([&](GgufParts& p) { p.Set("espalier.heads.1", GgufPart::Integers(heads)); }),
                HasSubstr("espalier.heads.1"));
  }
  EXPECT_THAT(after([](GgufParts& p) { p.Remove("espalier.ranking.1"); }),
              HasSubstr("expected key espalier.ranking.1 with it"));
  for (const char* name :
       {"blk.2.ffn_down.32.weight", "blk.-1.ffn_down.32.weight", "x", "blk.1.ffn_down.33.weight",
        "blk.1.ffn_down.96.weight", "blk.1.ffn_down.32.weight.", "blk.01.ffn_down.32.weight"}) {
    EXPECT_THAT(after([&](GgufParts& p) { p.tensors[0].name = name; }), HasSubstr(name));
  }
  for (const char* name : {"blk.2.attn_k.mean", "blk.0.attn_k.means", "blk.00.attn_k.mean"}) {
    EXPECT_THAT(after([&](GgufParts& p) { p.tensors[1].name = name; }), HasSubstr(name));
  }
  EXPECT_THAT(after([](GgufParts& p) {
                p.tensors[1].dims = {4};
                p.tensors[1].data.resize(16);
              }),
              HasSubstr("blk.0.attn_k.mean: expected F32 [1, 8], got F32 [1, 4]"));
  EXPECT_THAT(after([](GgufParts& p) {
                const float fault = std::nanf("");
                std::memcpy(p.tensors[1].data.data() + 4, &fault, sizeof(fault));
              }),
              HasSubstr("blk.0.attn_k.mean: expected finite values"));
  EXPECT_THAT(after([](GgufParts& p) {
                p.tensors[0].dims = {32, 15};
                p.tensors[0].data.resize(15 * sizeof(FourBitGroup));
              }),
              HasSubstr("expected Q4_1 [16, 32], got Q4_1 [15, 32]"));
  EXPECT_THAT(after([](GgufParts& p) {
                p.tensors[0].type = 0;
                p.tensors[0].data.resize(32 * 16 * 4);
              }),
              HasSubstr("expected Q4_1 [16, 32], got F32"));
}

TEST(PruningFile, LiesBesideTheModel) {
  EXPECT_EQ(LadderPathOf("a/m.gguf"), "a/m.ladder");
  EXPECT_EQ(LadderPathOf("a/folder//"), "a/folder.ladder");
  EXPECT_EQ(ChannelsPathOf("a/m.ladder"), "a/m.ladder.gguf");
}

TEST(PruningFile, ThatCannotBeWrittenIsTold) {
  const absl::Status status = WritePruningFile("/nowhere/p.gguf", SmallModel(), SomeData());
  EXPECT_THAT(std::string(status.message()), HasSubstr("/nowhere/p.gguf: cannot be written"));
}

}  // namespace
}  // namespace espalier
