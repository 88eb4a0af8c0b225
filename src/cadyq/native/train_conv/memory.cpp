#include "memory.h"

#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cadyq {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMaxIdle = size_t{3} << 30;

struct Cache {
  std::mutex mutex;
  std::multimap<size_t, void*> idle;
  std::unordered_map<void*, size_t> sizes;
  size_t idle_bytes = 0;

  void drop(std::multimap<size_t, void*>::iterator it) {
    idle_bytes -= it->first;
    sizes.erase(it->second);
    std::free(it->second);
    idle.erase(it);
  }
};

// Never destroyed: arrays may outlive static objects at exit.
Cache& cache() {
  static Cache* c = new Cache;
  return *c;
}

}  // namespace

void* block_alloc(size_t bytes) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  Cache& c = cache();
  std::lock_guard<std::mutex> lock(c.mutex);
  auto it = c.idle.lower_bound(bytes);
  if (it != c.idle.end() && it->first <= bytes + bytes / 4) {
    void* block = it->second;
    c.idle_bytes -= it->first;
    c.idle.erase(it);
    return block;
  }
  void* block = std::aligned_alloc(kHugePage, bytes);
  if (!block) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(block, bytes, MADV_HUGEPAGE);
#endif
  c.sizes[block] = bytes;
  return block;
}

void block_free(void* block) {
  Cache& c = cache();
  std::lock_guard<std::mutex> lock(c.mutex);
  const size_t bytes = c.sizes.at(block);
  auto it = c.idle.insert({bytes, block});
  c.idle_bytes += bytes;
  // The largest go first, this one last: sizes that are no longer asked for should not stay for ever.
  while (c.idle_bytes > kMaxIdle && c.idle.size() > 1) {
    auto victim = std::prev(c.idle.end());
    if (victim == it) --victim;
    c.drop(victim);
  }
}

void block_release() {
  Cache& c = cache();
  std::lock_guard<std::mutex> lock(c.mutex);
  while (!c.idle.empty()) c.drop(c.idle.begin());
}

}  // namespace cadyq
