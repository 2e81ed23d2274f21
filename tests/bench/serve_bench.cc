// What serving costs beside computing: tokens/s of 32 streams through gRPC against the engine alone
// in this process, CPU time of the server's threads, and the price of scraping /metrics at 20 Hz.
//
//   serve_bench MODEL [TURNS]
//
// Alone, served, and served while scraped take turns. The server is the real one, a child; the
// client is this process, and its CPU time displaces both others on a small machine.
#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/server_process.h"
#include "tools/bench_run.h"
#include "tools/load_run.h"
#include "tools/local_model.h"
#include "tools/machine.h"
#include "tools/statistics.h"

namespace espalier {
namespace {

constexpr int kStreams = 32, kPrompt = 128, kGenerate = 128, kStepRows = 128;
constexpr std::chrono::milliseconds kScrapeInterval{50};

// A port that was free a moment ago.
int FreePort() {
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
  socklen_t size = sizeof(address);
  bind(listener, reinterpret_cast<sockaddr*>(&address), size);
  getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size);
  close(listener);
  return ntohs(address.sin_port);
}

std::string Scrape(int port) {
  const int connection = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{.sin_family = AF_INET,
                      .sin_port = htons(static_cast<uint16_t>(port)),
                      .sin_addr = {htonl(INADDR_LOOPBACK)}};
  std::string answer;
  if (connect(connection, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0) {
    constexpr std::string_view kRequest = "GET /metrics HTTP/1.1\r\nConnection: close\r\n\r\n";
    if (write(connection, kRequest.data(), kRequest.size()) == ssize_t{kRequest.size()}) {
      char buffer[16384];
      for (ssize_t n; (n = read(connection, buffer, sizeof(buffer))) > 0;) answer.append(buffer, n);
    }
  }
  close(connection);
  return answer;
}

double Metric(const std::string& text, std::string_view name) {
  const size_t at = text.find(fmt::format("\n{} ", name));
  return at == std::string::npos ? 0 : std::strtod(text.c_str() + at + name.size() + 2, nullptr);
}

// Those that compute. All others are the front: gRPC's, the writer, metrics, supervision.
bool Computes(std::string_view thread) {
  return thread == "engine" || thread.starts_with("kernels");
}

struct Served {
  double tokens_per_s = 0;
  double step_seconds = 0;                // of all steps
  std::map<std::string, double> threads;  // CPU seconds by name
  double front() const {
    double seconds = 0;
    for (const auto& [name, cpu] : threads) seconds += Computes(name) ? 0 : cpu;
    return seconds;
  }
};

absl::StatusOr<Served> Serve(const ServerProcess& server, int metrics_port,
                             const RemoteOptions& remote, int vocabulary, int seed, bool scrape) {
  const auto stub = v1::EspalierService::NewStub(Connect(remote));
  std::atomic<bool> done = false;
  std::thread scraper([&] {
    while (scrape && !done) {
      Scrape(metrics_port);
      std::this_thread::sleep_for(kScrapeInterval);
    }
  });
  const double steps_before = Metric(Scrape(metrics_port), "espalier_step_seconds_sum");
  const std::map<std::string, double> before = server.thread_seconds();
  const LoadReport report = RunLoad(stub.get(), remote,
                                    {.requests = kStreams,
                                     .concurrency = kStreams,
                                     .prompt_tokens = kPrompt,
                                     .max_tokens = kGenerate,
                                     .vocabulary = vocabulary,
                                     .seed = static_cast<uint64_t>(seed)},
                                    [](int64_t, int64_t) {});
  Served served{.threads = server.thread_seconds()};
  done = true;
  scraper.join();
  for (const auto& [name, seconds] : before) served.threads[name] -= seconds;
  served.tokens_per_s = static_cast<double>(report.tokens) / report.seconds;
  served.step_seconds = Metric(Scrape(metrics_port), "espalier_step_seconds_sum") - steps_before;
  if (report.finished != kStreams || served.step_seconds <= 0) {
    return absl::UnavailableError(fmt::format("{} of {} streams finished, in {} s of steps",
                                              report.finished, kStreams, served.step_seconds));
  }
  return served;
}

absl::Status Run(const std::string& model_path, int turns) {
  absl::StatusOr<LocalModel> model =
      LoadLocalModel({.model = model_path}, kStreams * PagedTokens(kPrompt + kGenerate), kStepRows);
  if (!model.ok()) return model.status();
  const int vocabulary = model->executor->config().vocabulary;
  const BenchEngine alone{.executor = model->executor.get(),
                          .geometry = model->executor->kv_geometry(),
                          .ladder = &model->executor->ladder(),
                          .vocabulary = vocabulary,
                          .step_rows = kStepRows};
  const BenchShape shape{.batch = kStreams, .prompt = kPrompt, .generate = kGenerate};

  const int metrics_port = FreePort();
  ServerProcess server(ESPALIER_SERVER, {"--model", model_path, "--log-level", "warning",
                                         "--metrics-port", fmt::format("{}", metrics_port)});
  const RemoteOptions remote{.address = fmt::format("127.0.0.1:{}", server.port())};
  v1::GetLoadResponse load;
  for (int i = 0;; ++i) {
    const absl::Status up =
        UnaryCall(remote, &v1::EspalierService::Stub::GetLoad, v1::GetLoadRequest(), &load);
    if (up.ok()) break;
    if (i == 1000) return up;  // 20 s, and what the calls took
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }

  CpuWatch watch;
  std::vector<double> engine, served, scraped, front, front_scraped, share, price;
  std::map<std::string, double> threads;  // CPU seconds, of `served`
  double step_seconds = 0;
  for (int turn = 0; turn < turns; ++turn) {
    const absl::StatusOr<BenchResult> result =
        RunBench(alone, shape, turn + 1, [](int64_t, int64_t) {});
    if (!result.ok()) return result.status();
    engine.push_back(result->total_tokens_per_s(shape));
    const auto plain = Serve(server, metrics_port, remote, vocabulary, turn + 1, false);
    if (!plain.ok()) return plain.status();
    const auto watched = Serve(server, metrics_port, remote, vocabulary, turn + 1001, true);
    if (!watched.ok()) return watched.status();
    served.push_back(plain->tokens_per_s);
    scraped.push_back(watched->tokens_per_s);
    front.push_back(plain->front() / plain->step_seconds);
    front_scraped.push_back(watched->front() / watched->step_seconds);
    share.push_back(plain->tokens_per_s / engine.back());
    price.push_back(1 - watched->tokens_per_s / plain->tokens_per_s);
    for (const auto& [name, seconds] : plain->threads) threads[name] += seconds;
    step_seconds += plain->step_seconds;
    fmt::print("turn {}: engine alone {:.0f} tokens/s, served {:.0f}, scraped {:.0f}\n", turn + 1,
               engine.back(), served.back(), scraped.back());
  }
  const double others = watch.OthersShare().value_or(0);

  fmt::print("\nmedians of {} turns, {} streams, {} + {} tokens\n", turns, kStreams, kPrompt,
             kGenerate);
  fmt::print("  engine alone           {:8.0f} tokens/s\n", Median(engine));
  fmt::print("  through gRPC           {:8.0f} tokens/s, {:.1f} % of it\n", Median(served),
             100 * Median(share));
  fmt::print("  and scraped at 20 Hz   {:8.0f} tokens/s, {:.1f} % less\n", Median(scraped),
             100 * Median(price));
  fmt::print("  front end's CPU time   {:8.2f} % of the steps' time, {:.2f} % when scraped\n",
             100 * Median(front), 100 * Median(front_scraped));
  for (const auto& [name, seconds] : threads) {
    if (seconds < 1e-4 * step_seconds) continue;
    fmt::print("    {:<16} {:8.2f} %{}\n", name, 100 * seconds / step_seconds,
               Computes(name) ? " (computes)" : "");
  }
  fmt::print("  (the client and others: {:.0f} % of the cores)\n", 100 * others);

  const std::string out = ESPALIER_FIGURES "/serve-bench.json";
  std::filesystem::create_directories(ESPALIER_FIGURES);
  std::ofstream file(out);
  file << fmt::format(
      "{{\n  \"machine\": \"{}\",\n  \"turns\": {},\n  \"engine_tokens_per_s\": {:.6g},\n"
      "  \"served_tokens_per_s\": {:.6g},\n  \"served_share\": {:.6g},\n"
      "  \"front_cpu_share\": {:.6g},\n  \"front_cpu_share_scraped\": {:.6g},\n"
      "  \"scrape_price\": {:.6g}\n}}\n",
      MachineName(), turns, Median(engine), Median(served), Median(share), Median(front),
      Median(front_scraped), Median(price));
  file.close();
  if (!file) return absl::UnavailableError("cannot write " + out);
  fmt::print("figures: {}\n", out);
  return absl::OkStatus();
}

}  // namespace
}  // namespace espalier

int main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    fmt::print(stderr, "usage: serve_bench MODEL [TURNS]\n");
    return 2;
  }
  const int turns = argc == 3 ? std::atoi(argv[2]) : 3;
  const absl::Status status = espalier::Run(argv[1], std::max(1, turns));
  if (!status.ok()) fmt::print(stderr, "serve_bench: {}\n", status.ToString());
  return status.ok() ? 0 : 1;
}
