#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if !defined(_WIN32)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace cadyq {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

// The threads of the OpenMP runtime that torch works with, where there is one: after each of torch's operations they wait
// for the next one without sleeping, and would hold the cores against threads of our own (a third of a step's time).
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

#if !defined(_WIN32)
const pid_t kLoadedBy = getpid();

Team team() {
  static const Team found = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return getpid() == kLoadedBy ? found : nullptr;  // a forked child has none of the runtime's threads
}
#else
Team team() { return nullptr; }
#endif

// Memory that only grows. On huge pages where the system has them: the kernels walk dozens of planes at once.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  float* grow(size_t n_floats) {
    size_t bytes = (n_floats * sizeof(float) + kHugePage - 1) / kHugePage * kHugePage;
    if (bytes > bytes_) {
      std::free(data_);
      data_ = static_cast<float*>(std::aligned_alloc(kHugePage, bytes));
      bytes_ = data_ ? bytes : 0;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
      if (data_) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  size_t bytes_ = 0;
};

class Pool {
 public:
  void resize(int n_threads) {
    n_threads_ = n_threads;
    while (static_cast<int>(buffers_.size()) < n_threads + 1) buffers_.emplace_back();
    while (!team() && static_cast<int>(threads_.size()) < n_threads - 1) {
      int worker = static_cast<int>(threads_.size()) + 1;
      threads_.emplace_back([this, worker] { work(worker); });
      // Never joined: at exit the process may already have ended the threads of a library being unloaded.
      threads_.back().detach();
    }
  }

  void run(int64_t n_items, void (*fn)(void*, int64_t, int), void* ctx) {
    int helpers = static_cast<int>(n_items < n_threads_ ? n_items : n_threads_) - 1;
    next_ = 0;
    if (helpers <= 0) {
      for (int64_t i = 0; i < n_items; ++i) fn(ctx, i, 0);
      return;
    }
    if (Team team_run = team()) {
      struct Work {
        Pool* pool;
        void (*fn)(void*, int64_t, int);
        void* ctx;
        int64_t n_items;
        std::atomic<int> workers{0};
      } work{this, fn, ctx, n_items};
      auto join = [](void* p) {
        Work& w = *static_cast<Work*>(p);
        w.pool->drain(w.fn, w.ctx, w.n_items, w.workers.fetch_add(1));
      };
      team_run(join, &work, static_cast<unsigned>(helpers + 1), 0);
      return;
    }
    {
      std::lock_guard<std::mutex> guard(mutex_);
      fn_ = fn, ctx_ = ctx, n_items_ = n_items;
      helpers_ = pending_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    drain(fn, ctx, n_items, 0);
    std::unique_lock<std::mutex> guard(mutex_);
    done_.wait(guard, [this] { return pending_ == 0; });
  }

  float* scratch(int worker, size_t n_floats) { return buffers_[static_cast<size_t>(worker + 1)].grow(n_floats); }

  std::mutex lease;
#if !defined(_WIN32)
  const pid_t owner = getpid();
#endif

 private:
  void drain(void (*fn)(void*, int64_t, int), void* ctx, int64_t n_items, int worker) {
    for (int64_t i; (i = next_.fetch_add(1)) < n_items;) fn(ctx, i, worker);
  }

  void work(int worker) {
    uint64_t seen = 0;
    for (;;) {
      std::unique_lock<std::mutex> guard(mutex_);
      wake_.wait(guard, [&] { return generation_ != seen; });
      seen = generation_;
      if (worker > helpers_) continue;
      auto fn = fn_;
      auto ctx = ctx_;
      int64_t n_items = n_items_;
      guard.unlock();
      drain(fn, ctx, n_items, worker);
      guard.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> threads_;
  std::vector<Buffer> buffers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<int64_t> next_{0};
  void (*fn_)(void*, int64_t, int) = nullptr;
  void* ctx_ = nullptr;
  int64_t n_items_ = 0;
  uint64_t generation_ = 0;
  int helpers_ = 0, pending_ = 0, n_threads_ = 1;
};

// A forked child has none of its parent's threads, so it starts its own pool; the old one is leaked on purpose.
Pool& process_pool() {
  static std::mutex guard;
  static Pool* pool = nullptr;
  std::lock_guard<std::mutex> lock(guard);
#if !defined(_WIN32)
  if (pool && pool->owner != getpid()) pool = nullptr;
#endif
  if (!pool) pool = new Pool;
  return *pool;
}

}  // namespace

PoolLease::PoolLease(int n_threads) {
  Pool& pool = process_pool();
  lock_ = std::unique_lock<std::mutex>(pool.lease);
  if (n_threads < 1) n_threads = 1;
  pool.resize(n_threads);
  runtime_.self = &pool;
  runtime_.n_threads = n_threads;
  runtime_.run = [](void* self, int64_t n, void (*fn)(void*, int64_t, int), void* ctx) {
    static_cast<Pool*>(self)->run(n, fn, ctx);
  };
  runtime_.scratch = [](void* self, int worker, size_t n) { return static_cast<Pool*>(self)->scratch(worker, n); };
}

}  // namespace cadyq
