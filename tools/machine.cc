#include "tools/machine.h"

#include <fmt/format.h>
#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <barrier>
#include <charconv>
#include <fstream>
#include <memory>
#include <sstream>
#include <thread>
#include <vector>

#include "tools/peak_loops.h"

namespace espalier {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

const PeakLoops& LoopsOf(Isa isa) {
#ifdef ESPALIER_X86
  // The ceiling of AVX-512 is told for AMX too: what tiles add depends on the group's length.
  if (isa == Isa::kAvx512Vnni || isa == Isa::kAmx) return kAvx512PeakLoops;
  if (isa == Isa::kAvxVnni) return kAvxVnniPeakLoops;
  if (isa == Isa::kAvx2) return kAvx2PeakLoops;
#endif
  (void)isa;
  return kPortablePeakLoops;
}

// Runs work(thread) on all threads at once, each again and again for `seconds`; the sum of what
// the threads report per second.
double RateOfAll(int threads, double seconds, const std::function<double(int thread)>& work) {
  std::vector<double> rates(threads);
  std::barrier start(threads);
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      work(t);  // faults pages in, raises the clock
      start.arrive_and_wait();
      const Clock::time_point begin = Clock::now();
      double done = 0;
      do {
        done += work(t);
      } while (SecondsSince(begin) < seconds);
      rates[t] = done / SecondsSince(begin);
    });
  }
  for (std::thread& worker : workers) worker.join();
  double sum = 0;
  for (double rate : rates) sum += rate;
  return sum;
}

// The best of three: what disturbs can only slow down.
double BestRate(int threads, const std::function<double(int thread)>& work) {
  double best = 0;
  for (int turn = 0; turn < 3; ++turn) best = std::max(best, RateOfAll(threads, 0.15, work));
  return best;
}

double ReadRate(int threads, size_t footprint) {
  const size_t words = footprint / threads / sizeof(uint64_t) / 8 * 8;
  std::vector<std::unique_ptr<uint64_t[]>> buffers(threads);
  return BestRate(threads, [&](int t) {
    if (!buffers[t]) {
      buffers[t] = std::make_unique_for_overwrite<uint64_t[]>(words);
      std::fill_n(buffers[t].get(), words, 1);  // one shared zero page would stay in the cache
    }
    uint64_t sum[8] = {};
    const uint64_t* data = buffers[t].get();
    for (size_t i = 0; i < words; i += 8) {
      for (int lane = 0; lane < 8; ++lane) sum[lane] += data[i + lane];
    }
    asm volatile("" : : "r"(sum) : "memory");
    return static_cast<double>(words * sizeof(uint64_t));
  });
}

std::string ReadFile(const char* path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

double OwnCpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) { return t.tv_sec + t.tv_usec * 1e-6; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

CpuTicks ReadTicks() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return {};
  return ParseProcStat(ReadFile("/proc/stat"),
                       [&](int core) { return core < CPU_SETSIZE && CPU_ISSET(core, &set); });
}

}  // namespace

size_t LastLevelCacheBytes() {
  const std::string text = ReadFile("/sys/devices/system/cpu/cpu0/cache/index3/size");
  size_t kibibytes = 0;
  std::from_chars(text.data(), text.data() + text.size(), kibibytes);
  return kibibytes << 10;
}

size_t DramFootprint() {
  const size_t available =
      size_t(sysconf(_SC_AVPHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return std::min(std::max(2 * LastLevelCacheBytes(), size_t{256} << 20), available / 4);
}

MeasuredCeilings MeasureCeilings(Isa isa, int threads, size_t footprint,
                                 const std::function<void(int done, int total)>& progress) {
  const PeakLoops& loops = LoopsOf(isa);
  constexpr int64_t kIterations = 100'000;  // a millisecond or less
  MeasuredCeilings result;
  result.read_footprint = footprint > 0 ? footprint : DramFootprint();
  progress(0, 4);
  result.read_bytes_per_s_1 = ReadRate(1, result.read_footprint);
  progress(1, 4);
  result.all.read_bytes_per_s = ReadRate(threads, result.read_footprint);
  progress(2, 4);
  result.all.int8_ops_per_s = BestRate(threads, [&](int) { return loops.int8(kIterations); });
  progress(3, 4);
  result.all.f32_ops_per_s = BestRate(threads, [&](int) { return loops.f32(kIterations); });
  progress(4, 4);
  return result;
}

std::string MachineName() {
  std::istringstream lines(ReadFile("/proc/cpuinfo"));
  std::string name = "unknown processor";
  for (std::string line; std::getline(lines, line);) {
    const size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) {
      name = line.substr(colon + 2);
      break;
    }
  }
  const int cores = UsableCores();
  return fmt::format("{}, {} core{}", name, cores, cores == 1 ? "" : "s");
}

CpuTicks ParseProcStat(std::string_view text, const std::function<bool(int core)>& ours) {
  CpuTicks ticks;
  std::istringstream lines{std::string(text)};
  for (std::string line; std::getline(lines, line);) {
    std::istringstream fields(line);
    std::string label;
    fields >> label;
    int core = -1;
    if (!label.starts_with("cpu") ||
        std::from_chars(label.data() + 3, label.data() + label.size(), core).ec != std::errc() ||
        !ours(core)) {
      continue;
    }
    uint64_t user = 0, nice = 0, system = 0, idle = 0, iowait = 0, irq = 0, softirq = 0, steal = 0;
    fields >> user >> nice >> system >> idle >> iowait >> irq >> softirq >> steal;
    ticks.busy += user + nice + system + irq + softirq + steal;
    ++ticks.cores;
  }
  return ticks;
}

void CpuWatch::Restart() {
  ticks_ = ReadTicks();
  own_seconds_ = OwnCpuSeconds();
  start_ = Clock::now();
}

std::optional<double> CpuWatch::OthersShare() const {
  const double wall = SecondsSince(start_);
  if (ticks_.cores == 0 || wall < 0.1) return std::nullopt;
  const double busy = static_cast<double>(ReadTicks().busy - ticks_.busy) /
                      static_cast<double>(sysconf(_SC_CLK_TCK));
  const double own = OwnCpuSeconds() - own_seconds_;
  return std::clamp((busy - own) / (wall * ticks_.cores), 0.0, 1.0);
}

}  // namespace espalier
