#include "engine/model/files/mapped_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdio>
#include <string>
#include <utility>

#include "tests/support/model_writer.h"

namespace espalier {
namespace {

using testing::HasSubstr;

TEST(MappedFile, HasTheBytesUntilTheLastOwnerGoes) {
  const TemporaryFolder folder;
  absl::StatusOr<MappedFile> file = MappedFile::Open(folder.Write("a", "some bytes"));
  ASSERT_TRUE(file.ok()) << file.status();
  MappedFile second = *std::move(file);
  EXPECT_EQ(second.bytes(), "some bytes");
  absl::StatusOr<MappedFile> other = MappedFile::Open(folder.Write("b", "others"));
  ASSERT_TRUE(other.ok()) << other.status();
  second = *std::move(other);
  EXPECT_EQ(second.bytes(), "others");
}

TEST(MappedFile, KnowsWhetherItIsAsItWasOpened) {
  const TemporaryFolder folder;
  const std::string path = folder.Write("a", "some bytes");
  const auto file = MappedFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_TRUE(file->Unchanged());
  file->LetGo();
  EXPECT_EQ(file->bytes(), "some bytes") << "read again";
  // Another in its place is none of its business.
  ASSERT_EQ(rename(folder.Write("b", "other").c_str(), path.c_str()), 0);
  EXPECT_TRUE(file->Unchanged());
  EXPECT_EQ(file->bytes(), "some bytes");
  const auto longer = MappedFile::Open(path);
  ASSERT_TRUE(longer.ok()) << longer.status();
  folder.Write("a", "other and more");
  EXPECT_FALSE(longer->Unchanged());
}

TEST(MappedFile, OfNoBytesIsEmpty) {
  const TemporaryFolder folder;
  const auto file = MappedFile::Open(folder.Write("empty", ""));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->bytes(), "");
}

TEST(MappedFile, NamesThePathAndTheSystemsReason) {
  const TemporaryFolder folder;
  const auto missing = MappedFile::Open(folder.Path("missing"));
  EXPECT_TRUE(absl::IsNotFound(missing.status()));
  EXPECT_EQ(missing.status().message(),
            folder.Path("missing") + ": open: No such file or directory");
}

TEST(MappedFile, RefusesWhatIsNoRegularFile) {
  const TemporaryFolder folder;
  ASSERT_EQ(mkfifo(folder.Path("pipe").c_str(), 0600), 0);
  for (const std::string& path : {folder.path(), folder.Path("pipe"), std::string("/dev/zero")}) {
    const auto file = MappedFile::Open(path);
    EXPECT_EQ(file.status().message(), path + ": expected a regular file");
  }
}

}  // namespace
}  // namespace espalier
