// A fixed set of threads that share out numbered jobs.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace cadyq {

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (auto& w : workers_) w.join();
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls job(index, thread) for every index below n; returns when all are done. `Job` is referred to, not copied.
  template <class Job>
  void run(int n, const Job& job) {
    if (workers_.empty() || n == 1) {
      for (int i = 0; i < n; ++i) job(i, 0);
      return;
    }
    call_ = [](const void* f, int i, int thread) { (*static_cast<const Job*>(f))(i, thread); };
    job_ = &job;
    n_ = n;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    share(0);
    while (busy_.load(std::memory_order_acquire) != 0) std::this_thread::yield();
  }

 private:
  void share(int thread) {
    for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_;) call_(job_, i, thread);
  }
  void work(int thread) {
    unsigned seen = 0;
    for (;;) {
      // Stages follow each other within microseconds, so a short spin saves most of the sleeping and waking.
      for (int spin = 0; spin < 2000 && generation_.load(std::memory_order_acquire) == seen; ++spin)
        std::this_thread::yield();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
      }
      ++seen;
      if (stop_) return;
      share(thread);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<unsigned> generation_{0};
  std::atomic<int> next_{0}, busy_{0};
  bool stop_ = false;
  const void* job_ = nullptr;
  void (*call_)(const void*, int, int) = nullptr;
  int n_ = 0;
};

}  // namespace cadyq
