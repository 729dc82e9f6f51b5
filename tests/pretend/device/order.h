// Which launches are known to be over for whom: a vector clock for each stream, event and the host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "record.h"

namespace pretend {

// For each stream, the number of its launches that are known to be over.
class Clock {
 public:
  uint64_t of(int64_t stream) const {
    auto place = static_cast<size_t>(stream);
    return place < counts_.size() ? counts_[place] : 0;
  }
  bool knows(int64_t stream, uint64_t launch) const { return launch <= of(stream); }
  bool covers(const Clock& other) const {
    for (size_t i = 0; i < other.counts_.size(); ++i)
      if (!knows(static_cast<int64_t>(i), other.counts_[i])) return false;
    return true;
  }
  uint64_t advance(int64_t stream) {
    reach(static_cast<size_t>(stream) + 1);
    return ++counts_[static_cast<size_t>(stream)];
  }
  void learn(const Clock& other) {
    reach(other.counts_.size());
    for (size_t i = 0; i < other.counts_.size(); ++i)
      counts_[i] = std::max(counts_[i], other.counts_[i]);
  }

 private:
  void reach(size_t size) {
    if (counts_.size() < size) counts_.resize(size, 0);
  }
  std::vector<uint64_t> counts_;
};

struct Order {
  std::vector<Clock> streams{Clock()};  // the first is the default stream
  Clock host;
};

inline Order& order() {
  static auto* one = new Order();
  return *one;
}

inline thread_local int64_t current_stream = 0;

inline int64_t new_stream() {
  Locked locked;
  order().streams.emplace_back();
  return static_cast<int64_t>(order().streams.size()) - 1;
}

// What has been launched on a stream so far: an event.
inline Clock clock_of(int64_t stream) {
  Locked locked;
  return order().streams.at(static_cast<size_t>(stream));
}

inline void make_wait(int64_t stream, const Clock& event) {
  Locked locked;
  order().streams.at(static_cast<size_t>(stream)).learn(event);
}

// A new launch on the current stream; the host launched it, so it comes after all the host knows.
inline uint64_t launch_time() {
  Locked locked;
  Clock& clock = order().streams.at(static_cast<size_t>(current_stream));
  clock.learn(order().host);
  return clock.advance(current_stream);
}

void transfers_end();  // transfers.h: those that the host has now waited for

inline void host_learns(const Clock& event) {
  Locked locked;
  order().host.learn(event);
  transfers_end();
}

inline void host_learns_stream(int64_t stream) { host_learns(clock_of(stream)); }

inline Clock clock_of_all() {
  Locked locked;
  Clock all;
  for (const Clock& clock : order().streams) all.learn(clock);
  return all;
}

// The host cannot go on before the current stream is done.
inline void host_waits(std::string why) {
  Locked locked;
  found(kWait, std::move(why));
  host_learns_stream(current_stream);
}

}  // namespace pretend
