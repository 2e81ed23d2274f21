#include "tests/support/server_process.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

namespace espalier {
namespace {

constexpr std::chrono::milliseconds kPoll{10};

}  // namespace

ServerProcess::ServerProcess(const std::string& binary, const std::vector<std::string>& arguments) {
  static int count = 0;
  port_file_ = std::filesystem::temp_directory_path() /
               fmt::format("espalier-port-{}-{}", getpid(), ++count);
  std::vector<std::string> all = {binary, "--port", "0", "--port-file", port_file_};
  all.insert(all.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& argument : all) argv.push_back(argument.data());
  argv.push_back(nullptr);
  child_ = fork();
  if (child_ == 0) {
    dup2(open("/dev/null", O_WRONLY), STDOUT_FILENO);
    execv(argv[0], argv.data());
    _exit(127);
  }
}

ServerProcess::~ServerProcess() {
  std::error_code none;
  std::filesystem::remove(port_file_, none);
  if (child_ <= 0) return;
  kill(child_, SIGTERM);
  // Its own drain takes 30 s at most.
  for (int i = 0; i < 4000 && !Ended(); ++i) std::this_thread::sleep_for(kPoll);
  if (Ended()) return;
  kill(child_, SIGKILL);
  waitpid(child_, nullptr, 0);
}

bool ServerProcess::Ended() {
  if (child_ > 0 && waitpid(child_, nullptr, WNOHANG) != 0) child_ = -1;
  return child_ <= 0;
}

int ServerProcess::port() {
  for (int i = 0; i < 2000 && !Ended(); ++i) {
    int port = 0;
    if (std::ifstream(port_file_) >> port) return port;
    std::this_thread::sleep_for(kPoll);
  }
  return 0;
}

uint64_t ServerProcess::resident_bytes() const {
  uint64_t size = 0, resident = 0;
  std::ifstream(fmt::format("/proc/{}/statm", child_)) >> size >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

std::map<std::string, double> ServerProcess::thread_seconds() const {
  std::map<std::string, double> seconds;
  std::error_code gone;  // a thread may end while it is looked at
  std::filesystem::directory_iterator task(fmt::format("/proc/{}/task", child_), gone);
  for (; !gone && task != std::filesystem::directory_iterator(); task.increment(gone)) {
    std::string name;
    int64_t nanoseconds = 0;
    std::getline(std::ifstream(task->path() / "comm"), name);
    std::ifstream(task->path() / "schedstat") >> nanoseconds;
    seconds[name] += 1e-9 * static_cast<double>(nanoseconds);
  }
  return seconds;
}

}  // namespace espalier
