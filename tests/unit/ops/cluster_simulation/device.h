// A GPU of threads, as far as csrc/cuda/rows_cluster.cuh needs one: blocks, clusters, shuffles, and a copy engine that is late.
//
// Every CUDA thread is a std::thread. Bulk copies land after a random delay and a load fills its target with garbage first, so
// that a missing wait shows as a wrong number, and a barrier that nobody completes as a message.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline

using std::max;
using std::min;

struct float2 { float x, y; };
struct alignas(8) uint2 { uint32_t x, y; };
struct float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float __int_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }

// The half types, rounded to nearest even.
struct __nv_bfloat16 { uint16_t bits; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
struct __half { uint16_t bits; };
struct __half2 { __half x, y; };
inline float __bfloat162float(__nv_bfloat16 value) { return std::bit_cast<float>(uint32_t(value.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                                    : std::ldexp(float(exponent ? mantissa + 1024 : mantissa), (exponent ? exponent : 1) - 25);
  return value.bits & 0x8000 ? -size : size;
}
inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (value != value) return {0x7fff};
  int exponent = std::max(value == 0 ? -14 : std::ilogb(value), -14);
  const float units = std::nearbyint(std::ldexp(std::abs(value), 10 - exponent));  // of the last place; 1024 to 2048 if normal
  if (std::ldexp(units, exponent - 10) >= 65536.0f) return {uint16_t(sign | 0x7c00)};
  return {uint16_t(sign | (int(units) + (exponent + 14) * 1024))};  // a carry goes into the exponent
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
template <typename V>
void __stcs(V* at, const V& value) { *at = value; }

namespace device {

constexpr size_t kStaticBytes = 8192;

[[noreturn]] inline void fail(const char* what) {
  std::printf("%s\n", what);
  std::fflush(stdout);
  std::_Exit(1);
}

struct Warp {
  std::barrier<> barrier{32};
  uint32_t lanes[32];
};

// One thread arrives per phase and says how many bytes to expect; bytes may come before it does.
struct TransactionBarrier {
  std::mutex mutex;
  std::condition_variable changed;
  uint32_t phase = 0;
  bool arrived = false;
  int64_t pending = 0;

  void add(int64_t bytes, bool arrives) {
    const std::lock_guard lock(mutex);
    if (arrives && arrived) fail("two arrivals in one phase of a barrier");
    arrived |= arrives;
    pending += bytes;
    if (!arrived || pending != 0) return;
    ++phase;
    arrived = false;
    changed.notify_all();
  }
};

struct Cluster;

struct Block {
  Block(Cluster& of, uint32_t rank_, int64_t index_, int threads, size_t bytes)
      : cluster(of), rank(rank_), index(index_), barrier(threads), shared(bytes + 128, 0xcd), warps(threads / 32), running(threads) {
    for (auto& warp : warps) warp = std::make_unique<Warp>();
  }

  TransactionBarrier& at(const void* address) {
    const std::lock_guard lock(mutex);
    auto& found = barriers[address];
    if (found == nullptr) found = std::make_unique<TransactionBarrier>();
    return *found;
  }

  unsigned char* dynamic() { return shared.data() + (128 - reinterpret_cast<uintptr_t>(shared.data()) % 128); }

  Cluster& cluster;
  uint32_t rank;
  int64_t index;
  std::barrier<> barrier;
  std::vector<unsigned char> shared;
  alignas(128) unsigned char variables[kStaticBytes] = {};
  std::vector<std::unique_ptr<Warp>> warps;
  std::map<const void*, std::unique_ptr<TransactionBarrier>> barriers;
  std::mutex mutex;
  std::atomic<int> running;
};

struct Cluster {
  explicit Cluster(int threads) : barrier(2 * threads) {}  // an arrival for each half
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

inline thread_local Block* block = nullptr;
inline thread_local int thread = 0;

struct Thread { struct { operator int() const { return thread; } } x; };
struct BlockIndex { struct { operator int64_t() const { return block->index; } } x; };

inline void delay() {
  static thread_local std::mt19937 random(std::random_device{}());
  std::this_thread::sleep_for(std::chrono::microseconds(random() % 200));
}

}  // namespace device

static const device::Thread threadIdx{};
static const device::BlockIndex blockIdx{};

inline void __syncthreads() { device::block->barrier.arrive_and_wait(); }

inline float __shfl_xor_sync(uint32_t, float value, int offset) {
  device::Warp& warp = *device::block->warps[device::thread / 32];
  warp.lanes[device::thread % 32] = std::bit_cast<uint32_t>(value);
  warp.barrier.arrive_and_wait();
  const float other = std::bit_cast<float>(warp.lanes[(device::thread % 32) ^ offset]);
  warp.barrier.arrive_and_wait();
  return other;
}

namespace rlsc::cuda::hopper {  // the functions of csrc/cuda/hopper.cuh

inline void barrier_init(uint64_t* barrier) { device::block->at(barrier); }
inline void fence_barrier_init() {}
inline uint32_t cluster_rank() { return device::block->rank; }
inline void cluster_arrive() { (void)device::block->cluster.barrier.arrive(); }
inline void cluster_wait() { device::block->cluster.barrier.arrive_and_wait(); }

inline void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) { device::block->at(barrier).add(bytes, true); }

inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  device::TransactionBarrier& waited = device::block->at(barrier);
  std::unique_lock lock(waited.mutex);
  const bool done = waited.changed.wait_for(lock, std::chrono::seconds(60), [&] { return (waited.phase & 1) != parity; });
  if (!done) device::fail("a barrier was waited for that nobody completes");
}

inline void check_copy(const void* shared, const void* global, uint32_t bytes) {
  const bool aligned = reinterpret_cast<uintptr_t>(shared) % 16 == 0 && reinterpret_cast<uintptr_t>(global) % 16 == 0 && bytes % 16 == 0;
  if (!aligned) device::fail("a bulk copy is not aligned to 16 bytes");
}

inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  check_copy(shared, global, bytes);
  device::TransactionBarrier* landed = &device::block->at(barrier);
  std::memset(shared, 0xee, bytes);
  std::thread([=] {
    device::delay();
    std::memcpy(shared, global, bytes);
    landed->add(-int64_t(bytes), false);
  }).detach();
}

inline void store_to_peer(float4* local, uint32_t peer, const float4& value, uint64_t* barrier) {
  device::Block& mine = *device::block;
  const auto offset = [&](const void* address) {
    const size_t bytes = reinterpret_cast<const unsigned char*>(address) - mine.variables;
    if (bytes + sizeof(value) > device::kStaticBytes) device::fail("a peer's variable is outside of its shared memory");
    return bytes;
  };
  device::Block* other = mine.cluster.blocks[peer].get();
  unsigned char* at = other->variables + offset(local);
  device::TransactionBarrier* counted = &other->at(other->variables + offset(barrier));
  std::thread([=] {
    device::delay();
    if (other->running == 0) device::fail("a message reached a block that had returned");
    std::memcpy(at, &value, sizeof(value));
    counted->add(-int64_t(sizeof(value)), false);
  }).detach();
}

}  // namespace rlsc::cuda::hopper
