#pragma once

#include <map>
#include <mutex>

namespace hata {

// Remembers what was computed for a key, so that it is computed once in a process; any number of
// threads may ask. If the computation throws, nothing is remembered.
template <typename Key, typename Value>
class Memo {
 public:
  template <typename Compute>
  Value get(const Key& key, const Compute& compute) {
    const std::lock_guard lock(mutex_);
    const auto found = values_.find(key);
    return found != values_.end() ? found->second : values_.emplace(key, compute()).first->second;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Value> values_;
};

}  // namespace hata
