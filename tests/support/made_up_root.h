// A made-up /proc and /sys for what reads the machine's.
#pragma once

#include <filesystem>
#include <fstream>
#include <string>

#include "gtest/gtest.h"

namespace espalier {

// An empty folder of the running test's, removed at the end.
class MadeUpRoot {
 public:
  MadeUpRoot() { std::filesystem::remove_all(path_); }
  ~MadeUpRoot() { std::filesystem::remove_all(path_); }
  MadeUpRoot(const MadeUpRoot&) = delete;
  MadeUpRoot& operator=(const MadeUpRoot&) = delete;

  // `path` is absolute, as the kernel has it.
  void Write(const std::string& path, const std::string& text) const {
    const std::filesystem::path full = path_ + path;
    std::filesystem::create_directories(full.parent_path());
    std::ofstream(full) << text;
  }
  const std::string& path() const { return path_; }

 private:
  static std::string TestName() {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    return std::string(test->test_suite_name()) + "_" + test->name();
  }
  const std::string path_ = ::testing::TempDir() + "root_of_" + TestName();
};

}  // namespace espalier
