// Hands streams from the engine thread to the threads that write them out.
//
// StartWrite serialises, frames and sends inline: 8 to 14 us a token on the thread that calls it.
// The engine thread pays one lock and at most one wake-up a step instead, for all of its streams.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "server/token_stream.h"

namespace espalier {

class ReadyQueue {
 public:
  // Starts `writers` (>= 1) threads that call OnReady of the readers.
  explicit ReadyQueue(int writers);
  // Hands out what waits, then joins. No Post may follow.
  ~ReadyQueue();

  // Engine thread. Queues each stream unless it waits already, and empties the list.
  void Post(std::vector<std::shared_ptr<TokenStream>>* streams);

 private:
  void Run();

  const size_t writer_count_;
  std::mutex mutex_;
  std::condition_variable posted_;
  std::vector<std::shared_ptr<TokenStream>> waiting_;
  bool stopping_ = false;
  std::vector<std::thread> writers_;
};

}  // namespace espalier
