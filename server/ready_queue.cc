#include "server/ready_queue.h"

#include <pthread.h>

#include <algorithm>
#include <iterator>

namespace espalier {

ReadyQueue::ReadyQueue(int writers) : writer_count_(static_cast<size_t>(writers)) {
  for (int i = 0; i < writers; ++i) {
    writers_.emplace_back([this] { Run(); });
    pthread_setname_np(writers_.back().native_handle(), "writer");
  }
}

ReadyQueue::~ReadyQueue() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  posted_.notify_all();
  for (std::thread& writer : writers_) writer.join();
}

void ReadyQueue::Post(std::vector<std::shared_ptr<TokenStream>>* streams) {
  std::erase_if(*streams, [](const std::shared_ptr<TokenStream>& stream) {
    return stream->queued_.exchange(true, std::memory_order_acq_rel);
  });
  if (streams->empty()) return;
  {
    std::lock_guard lock(mutex_);
    waiting_.insert(waiting_.end(), std::make_move_iterator(streams->begin()),
                    std::make_move_iterator(streams->end()));
  }
  streams->clear();
  posted_.notify_one();
}

void ReadyQueue::Run() {
  std::vector<std::shared_ptr<TokenStream>> taken;
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      posted_.wait(lock, [this] { return !waiting_.empty() || stopping_; });
      if (waiting_.empty()) return;
      // An even share, so that the other writers have work too.
      const size_t share = (waiting_.size() + writer_count_ - 1) / writer_count_;
      const auto first = waiting_.end() - static_cast<ptrdiff_t>(share);
      taken.assign(std::make_move_iterator(first), std::make_move_iterator(waiting_.end()));
      waiting_.erase(first, waiting_.end());
      if (!waiting_.empty()) posted_.notify_one();
    }
    for (const std::shared_ptr<TokenStream>& stream : taken) {
      // Before OnReady: what is pushed from now on queues the stream anew.
      stream->queued_.store(false, std::memory_order_release);
      if (const std::shared_ptr<StreamReader> reader = stream->reader_.lock()) reader->OnReady();
    }
    taken.clear();
  }
}

}  // namespace espalier
