// The books of the pretend device: what is counted, and what is told to Python.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace pretend {

// The kinds of findings, as findings.py names them.
inline constexpr const char* kWait = "wait";
inline constexpr const char* kLate = "late";  // a wait that leaves the device something to do
inline constexpr const char* kDevice = "device";
inline constexpr const char* kRace = "race";
inline constexpr const char* kLifetime = "lifetime";

using Listener = void (*)(const char* kind, const char* what);

struct Books {
  std::recursive_mutex mutex;
  Listener listener = nullptr;
  int64_t launches = 0, bytes_moved = 0;   // of kernels
  int64_t bytes_held = 0, peak_bytes = 0;  // of device tensors
};

inline Books& books() {
  static auto* one = new Books();  // outlives every tensor
  return *one;
}

// Holds the lock of everything in this folder. Findings wait until this thread's outermost one ends:
// the listener takes Python's lock, so it must not be called while others can wait for ours.
class Locked {
 public:
  Locked() {
    books().mutex.lock();
    ++depth();
  }
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;
  ~Locked() {
    std::vector<std::pair<const char*, std::string>> told;
    if (--depth() == 0) told.swap(queue());
    books().mutex.unlock();
    for (auto& [kind, what] : told)
      if (books().listener != nullptr) books().listener(kind, what.c_str());
  }
  static void found(const char* kind, std::string what) {
    Locked locked;
    queue().emplace_back(kind, std::move(what));
  }

 private:
  static int& depth() {
    thread_local int value = 0;
    return value;
  }
  static std::vector<std::pair<const char*, std::string>>& queue() {
    thread_local std::vector<std::pair<const char*, std::string>> value;
    return value;
  }
};

inline void found(const char* kind, std::string what) { Locked::found(kind, std::move(what)); }

}  // namespace pretend
