// glibc's longjmp, fortified, takes a jump to another stack for a mistake.
#undef _FORTIFY_SOURCE

#include "tests/simt/emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <cstdlib>
#include <map>
#include <numeric>
#include <span>
#include <string>

#include "fmt/format.h"
#include "kernels/cuda/arch.cuh"

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ADDRESS_SANITIZER
#endif
#endif
#ifdef SIMT_ADDRESS_SANITIZER
#include <sanitizer/common_interface_defs.h>
#endif

namespace espalier::simt {

class Grid;

namespace {

constexpr size_t kDeviceBytes = 1 << 20;
constexpr size_t kSharedBytes = 48 << 10;  // what every device gives without being asked
constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned kLanes = 32;
constexpr unsigned kMostThreads = 1024;

[[noreturn]] void Die(const std::string& why) {
  fmt::print(stderr, "simt: {}\n", why);
  std::abort();
}

struct Stack {
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake = nullptr;  // AddressSanitizer's, of who runs on this one and is left for now
};

// AddressSanitizer is told of a change of stacks before it and after.
void Leave([[maybe_unused]] Stack* from, [[maybe_unused]] const Stack& to) {
#ifdef SIMT_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(from == nullptr ? nullptr : &from->fake, to.bottom, to.bytes);
#endif
}
void Arrive([[maybe_unused]] const Stack& at, [[maybe_unused]] Stack* from) {
#ifdef SIMT_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(at.fake, from == nullptr ? nullptr : &from->bottom,
                                  from == nullptr ? nullptr : &from->bytes);
#endif
}

enum class State { kReady, kAtBarrier, kAtCollective, kLeft };

// It starts by its context, which takes two system calls, and goes on by its registers.
struct Fiber {
  ucontext_t context;
  jmp_buf registers;
  bool started;
  Stack stack;
  State state;
  Site site;       // where it waits
  uint32_t value;  // what a lane gives to the others, and then what it gets
};

thread_local Device* current_device = nullptr;
thread_local Grid* current_grid = nullptr;

// Of a block's threads. As much as a stack, below each, is nobody's: a thread that needs more
// crashes, where it would write to its neighbour's.
class Stacks {
 public:
  Stacks() {
    void* const at = mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) Die(fmt::format("there are no {} bytes for stacks", kBytes));
    begin_ = static_cast<std::byte*>(at);
    for (unsigned thread = 0; thread < kMostThreads; ++thread) {
      if (mprotect(Of(thread), kStackBytes, PROT_READ | PROT_WRITE) != 0) Die("mprotect fails");
    }
  }
  ~Stacks() { munmap(begin_, kBytes); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  std::byte* Of(unsigned thread) const { return begin_ + (2 * thread + 1) * kStackBytes; }

 private:
  static constexpr size_t kBytes = 2 * kMostThreads * kStackBytes;
  std::byte* begin_;
};

// Kept from launch to launch: the machine hands out fresh pages more slowly than a kernel runs.
const Stacks& ThreadStacks() {
  thread_local const Stacks stacks;
  return stacks;
}

}  // namespace

// One launch. Blocks run one after the other; a thread runs until it waits for others.
class Grid {
 public:
  Grid(Device* device, unsigned blocks, unsigned threads, void (*thread)(const void*),
       const void* arguments)
      : device_(device),
        blocks_(blocks),
        thread_(thread),
        arguments_(arguments),
        stacks_(ThreadStacks()),
        fibers_(threads),
        order_(threads) {}

  // Up to the first block whose threads wait for ever.
  void Run() {
    ++device_->launches_;
    std::vector<unsigned> order(blocks_);
    Arrange(&order);
    for (const unsigned block : order) {
      if (!RunBlock(block)) return;
    }
  }

  unsigned thread() const { return running_; }
  unsigned block() const { return block_; }

  void SyncThreads(Site site) {
    Fiber& own = fibers_[running_];
    own.site = site;
    own.state = State::kAtBarrier;
    if (++at_barrier_ == fibers_.size() && AllAt(fibers_, State::kAtBarrier, site)) {
      ++barriers_;
      at_barrier_ = 0;
      for (Fiber& fiber : fibers_) fiber.state = State::kReady;
    }
    Suspend(&own);
  }

  // `result` makes of the values of a warp's lanes, and a lane, what that lane gets.
  template <class Result>
  uint32_t Exchange(Site site, unsigned lanes, uint32_t value, const void* where, Result result) {
    if (lanes != ~0U) {
      AddFault(FaultKind::kPartialWarp, where,
               fmt::format("{}:{}: expected all lanes, found {:#x}", site.file, site.line, lanes),
               &device_->faults_);
    }
    Fiber& own = fibers_[running_];
    own.site = site;
    own.state = State::kAtCollective;
    own.value = value;
    const unsigned first = running_ / kLanes * kLanes;
    const std::span warp = std::span(fibers_).subspan(first, kLanes);
    if (AllAt(warp, State::kAtCollective, site)) {
      std::array<uint32_t, kLanes> values;
      for (unsigned lane = 0; lane < kLanes; ++lane) values[lane] = warp[lane].value;
      for (unsigned lane = 0; lane < kLanes; ++lane) {
        warp[lane].value = result(values, lane);
        warp[lane].state = State::kReady;
      }
    }
    Suspend(&own);
    return own.value;
  }

  void* SharedArray(const void* key, size_t bytes) {
    std::byte*& array = arrays_[key];
    if (array == nullptr) array = device_->shared_.Allocate(bytes);
    if (array == nullptr) Die(fmt::format("a block has no {} bytes of shared memory left", bytes));
    return array;
  }

  void Check(const void* at, size_t bytes, AccessKind kind, const void* where) {
    const Access access{.launch = device_->launches_,
                        .block = block_,
                        .thread = running_,
                        .barriers = barriers_,
                        .kind = kind,
                        .where = where};
    for (CheckedMemory* memory : {&device_->shared_, &device_->memory_}) {
      if (memory->Contains(at)) memory->Check(at, bytes, access, &device_->faults_);
    }
  }

 private:
  static bool AllAt(std::span<const Fiber> fibers, State state, Site site) {
    return std::ranges::all_of(fibers, [&](const Fiber& fiber) {
      return fiber.state == state && fiber.site.number == site.number;
    });
  }

  void Arrange(std::vector<unsigned>* order) {
    std::iota(order->begin(), order->end(), 0U);
    if (device_->seed_ == 1) std::ranges::reverse(*order);
    if (device_->seed_ > 1) std::ranges::shuffle(*order, device_->random_);
  }

  bool RunBlock(unsigned block) {
    block_ = block;
    barriers_ = at_barrier_ = 0;
    device_->shared_.Clear();
    arrays_.clear();
    for (unsigned i = 0; i < fibers_.size(); ++i) {
      Fiber& fiber = fibers_[i];
      fiber.stack = {.bottom = stacks_.Of(i), .bytes = kStackBytes};
      fiber.state = State::kReady;
      fiber.started = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks_.Of(i);
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Grid::RunThread, 0);
    }
    for (bool moved = true; moved;) {
      moved = false;
      Arrange(&order_);
      for (const unsigned i : order_) {
        if (fibers_[i].state != State::kReady) continue;
        Resume(i);
        moved = true;
      }
    }
    const auto left = [](const Fiber& fiber) { return fiber.state == State::kLeft; };
    if (std::ranges::all_of(fibers_, left)) return true;
    TellDivergence();
    return false;
  }

  static void RunThread() {
    Grid* const grid = current_grid;
    Arrive({}, &grid->host_stack_);
    grid->thread_(grid->arguments_);
    grid->fibers_[grid->running_].state = State::kLeft;
    Leave(nullptr, grid->host_stack_);
    _longjmp(grid->host_, 1);
  }

  void Resume(unsigned thread) {
    Fiber& fiber = fibers_[thread];
    running_ = thread;
    current_grid = this;
    Leave(&host_stack_, fiber.stack);
    if (_setjmp(host_) == 0) {
      if (fiber.started) _longjmp(fiber.registers, 1);
      fiber.started = true;
      setcontext(&fiber.context);
    }
    Arrive(host_stack_, nullptr);
    current_grid = nullptr;
  }

  // Back to the host.
  void Suspend(Fiber* own) {
    Leave(&own->stack, host_stack_);
    if (_setjmp(own->registers) == 0) _longjmp(host_, 1);
    Arrive(own->stack, nullptr);
  }

  void TellDivergence() {
    std::map<std::string, int> threads;
    for (const Fiber& fiber : fibers_) {
      const char* const what = fiber.state == State::kAtBarrier ? "barrier" : "collective";
      ++threads[fiber.state == State::kLeft
                    ? "the end"
                    : fmt::format("a {} at {}:{} ({})", what, fiber.site.file, fiber.site.line,
                                  fiber.site.number)];
    }
    std::string text = fmt::format("block {} waits for ever:", block_);
    for (const auto& [place, count] : threads) {
      text += fmt::format(" {} threads have come to {};", count, place);
    }
    AddFault(FaultKind::kDivergence, nullptr, text, &device_->faults_);
  }

  Device* const device_;
  const unsigned blocks_;
  void (*const thread_)(const void*);
  const void* const arguments_;
  const Stacks& stacks_;
  std::vector<Fiber> fibers_;
  std::vector<unsigned> order_;
  jmp_buf host_;
  Stack host_stack_;
  unsigned block_ = 0;
  unsigned running_ = 0;
  uint32_t barriers_ = 0;  // that the block has passed
  size_t at_barrier_ = 0;  // threads
  std::map<const void*, std::byte*> arrays_;
};

Device::Device(uint32_t seed)
    : seed_(seed), random_(seed), memory_("device", kDeviceBytes), shared_("shared", kSharedBytes) {
  if (current_device != nullptr) Die("a thread has one device at a time");
  current_device = this;
}

Device::~Device() { current_device = nullptr; }

std::byte* Device::AllocateBytes(size_t bytes) {
  std::byte* const at = memory_.Allocate(bytes);
  if (at == nullptr) Die(fmt::format("the device has no {} bytes left", bytes));
  return at;
}

void Device::CheckWritten(const void* at, size_t bytes, const void* where) {
  if (memory_.IsWritten(at, bytes)) return;
  AddFault(FaultKind::kUninitialised, where,
           fmt::format("of {} bytes that are copied back not all are written", bytes), &faults_);
}

void CheckAccess(const void* at, size_t bytes, AccessKind kind, const void* where) {
  if (current_grid != nullptr) current_grid->Check(at, bytes, kind, where);
}

Index ThreadIndex() { return {current_grid->thread()}; }
Index BlockIndex() { return {current_grid->block()}; }

void SyncThreads(Site site) { current_grid->SyncThreads(site); }

unsigned Ballot(Site site, unsigned lanes, bool vote) {
  const auto result = [](const auto& votes, unsigned) {
    uint32_t all = 0;
    for (unsigned lane = 0; lane < kLanes; ++lane) all |= votes[lane] << lane;
    return all;
  };
  return current_grid->Exchange(site, lanes, vote, __builtin_return_address(0), result);
}

unsigned ShuffleXor(Site site, unsigned lanes, unsigned value, int distance) {
  const auto result = [=](const auto& values, unsigned lane) {
    return values[(lane ^ distance) % kLanes];
  };
  return current_grid->Exchange(site, lanes, value, __builtin_return_address(0), result);
}

unsigned long long AtomicMin(unsigned long long* at, unsigned long long value) {
  CheckAccess(at, sizeof(*at), AccessKind::kAtomic, __builtin_return_address(0));
  const unsigned long long before = *at;
  *at = std::min(before, value);
  return before;
}

void* SharedArray(const void* key, size_t bytes) { return current_grid->SharedArray(key, bytes); }

void CheckArgument(const void* pointer) {
  if (current_device == nullptr) Die("a kernel was launched without a device");
  if (pointer == nullptr || current_device->memory_.Contains(pointer)) return;
  AddFault(FaultKind::kHostPointer, __builtin_return_address(0),
           fmt::format("a kernel is given {}, which is no memory of the device", pointer),
           &current_device->faults_);
}

void CheckStream(const CUstream_st* stream) {
  if (current_device == nullptr) Die("a kernel was launched without a device");
  if (stream == current_device->stream()) return;
  AddFault(FaultKind::kStream, __builtin_return_address(0),
           stream == nullptr ? "a kernel is launched on the default stream"
                             : "a kernel is launched on a stream that is not the device's",
           &current_device->faults_);
}

int RunGrid(unsigned blocks, unsigned threads, void (*thread)(const void*), const void* arguments) {
  if (current_device == nullptr) Die("a kernel was launched without a device");
  if (blocks == 0 || threads == 0 || threads > kMostThreads || threads % kLanes != 0) {
    Die(fmt::format("{} blocks of {} threads", blocks, threads));
  }
  Grid(current_device, blocks, threads, thread, arguments).Run();
  return 0;
}

}  // namespace espalier::simt
