// Fuzzes what training and the simulator read: refused in a short line, or written back as it was
// read. The first byte says what it is: b block orders, c costs, n a Q-network, t traffic.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "engine/sim/cost_model.h"
#include "engine/sim/traffic.h"
#include "policy/blocks/block_orders.h"
#include "policy/training/q_network.h"
#include "tests/fuzz/fuzz_check.h"

namespace espalier {
namespace {

void Refused(const std::string& error) { RequireOneLine(absl::InvalidArgumentError(error)); }

void Orders(std::string_view text) {
  BlockOrders orders, again;
  std::string error;
  if (!ParseBlockOrders(text, &orders, &error)) return Refused(error);
  const std::string written = FormatBlockOrders(orders, "fuzzed");
  Require(ParseBlockOrders(written, &again, &error), "what is written is read: " + error);
  Require(again.orders == orders.orders, "what is read is what was written");
  for (const BlockOrder& order : orders.orders) {
    for (const int block : order.blocks) Require(block < 2 * orders.layers, "blocks are there");
  }
}

void Costs(std::string_view text) {
  CostModel costs, again;
  std::string error;
  if (!ParseCosts(text, &costs, &error)) return Refused(error);
  Require(ParseCosts(FormatCosts(costs, "fuzzed"), &again, &error), "what is written is read");
  Require(again.rungs.size() == costs.rungs.size(), "what is read is what was written");
}

void Network(std::string_view bytes) {
  TrainedFor trained;
  std::string error;
  const std::optional<QNetwork> network = QNetwork::Parse(bytes, &trained, &error);
  if (!network) return Refused(error);
  Require(network->Format(trained) == bytes, "what is read is what was written");
  Require(trained.load_loss >= 0 && trained.ttft_target_s > 0 && trained.tpot_target_s > 0,
          "options are in their ranges");
  const std::vector<float> state(network->shape().inputs, 1);
  std::vector<float> hidden(network->shape().hidden), values(network->shape().actions);
  network->Values(state, hidden, values);
}

void CallsAndMemory(std::string_view text) {
  Traffic traffic;
  std::string error;
  if (!ParseTraffic(text, &traffic, &error)) return Refused(error);
  for (const SimCall& call : traffic.calls) {
    Require(call.arrival.count() >= 0 && call.prompt > 0 && call.output > 0, "calls are calls");
  }
}

}  // namespace
}  // namespace espalier

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace espalier;  // NOLINT: the entry point cannot lie in it
  if (size == 0) return 0;
  const std::string_view input(reinterpret_cast<const char*>(data) + 1, size - 1);
  switch (data[0]) {
    case 'b':
      Orders(input);
      break;
    case 'c':
      Costs(input);
      break;
    case 'n':
      Network(input);
      break;
    case 't':
      CallsAndMemory(input);
      break;
    default:
      break;
  }
  return 0;
}
