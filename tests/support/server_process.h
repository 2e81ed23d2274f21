// The real server as a child process, and what the system tells of it.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace espalier {

class ServerProcess {
 public:
  // Starts `binary` with `arguments` on a free gRPC port. Whether it came up is told by port().
  ServerProcess(const std::string& binary, const std::vector<std::string>& arguments);
  // SIGTERM, and waits 40 s for its end before SIGKILL.
  ~ServerProcess();

  // Waits until it listens; 0 if it has not after 20 s, or has ended. It may still be loading.
  int port();

  uint64_t resident_bytes() const;
  // CPU time so far by name of thread, seconds; threads of one name are added up.
  std::map<std::string, double> thread_seconds() const;

 private:
  bool Ended();

  std::string port_file_;
  pid_t child_ = -1;  // not positive: none, or it has ended
};

}  // namespace espalier
