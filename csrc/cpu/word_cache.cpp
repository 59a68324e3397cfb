// A cache of encoded words for SentencePiece BPE: a text is split where no merge reaches across, and only parts that are new are encoded.
//
// A plain C interface, called through ctypes: preprocessing needs neither torch nor one particular version of Python. `scan` splits texts
// into parts and finds those that are new, `learn` stores the ids of the new ones, and `write` returns the ids of all.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

namespace megatron_patch {
namespace {

static_assert(std::endian::native == std::endian::little, "words are compared eight bytes at a time, the first in the lowest");

// Classes of characters: each ASCII character, where ▁ (E2 96 81 in UTF-8) counts as a space, and all others.
constexpr int kOther = 128;
constexpr int kClasses = kOther + 1;

bool is_mark(const uint8_t* bytes) { return bytes[0] == 0xE2 && bytes[1] == 0x96 && bytes[2] == 0x81; }

int class_before(const uint8_t* begin, const uint8_t* at) {
  if (at[-1] < kOther) return at[-1];
  return at - begin >= 3 && is_mark(at - 3) ? ' ' : kOther;
}

int class_after(const uint8_t* at, const uint8_t* end) {
  if (at[0] < kOther) return at[0];
  return end - at >= 3 && is_mark(at) ? ' ' : kOther;
}

uint64_t eight_bytes(const uint8_t* bytes) {
  uint64_t value;
  std::memcpy(&value, bytes, 8);
  return value;
}

// The first bytes of eight that were loaded; `count` from 0 to 8.
uint64_t first_bytes(uint64_t value, uint64_t count) {
  return count >= 8 ? value : value & ((uint64_t{1} << (8 * count)) - 1);
}

uint64_t mixed(uint64_t hash, uint64_t eight) {
  hash = (hash ^ eight) * 0x9E3779B97F4A7C15u;
  return hash ^ (hash >> 32);
}

constexpr uint64_t kInside = 16;  // bytes of a key that are stored in the word itself
constexpr uint64_t kIdsInside = 6;

// One cache line: everything that comparing and writing most words needs.
struct alignas(64) Word {
  uint64_t first, second;  // the key's first bytes, and zeros
  uint64_t key;            // start of a longer key in keys_
  uint32_t length, count;  // of the key in bytes, and ids
  union {
    uint32_t ids[kIdsInside];
    uint64_t ids_start;  // in ids_, if there are more ids than fit in here
  };
};

struct Slot {
  uint32_t hash, word;  // word: index + 1; 0: free
};

class WordCache {
 public:
  // `adjacent`: kClasses x kClasses, 1 if characters of two classes are adjacent in a piece of the vocabulary.
  WordCache(const uint8_t* adjacent, uint64_t max_bytes) : adjacent_(adjacent, adjacent + kClasses * kClasses), max_bytes_(max_bytes) {
    clear();
  }

  // Splits texts, which follow one another and end at `ends`; 8 bytes after the last must be readable. Returns the number of new parts.
  int64_t scan(const uint8_t* bytes, const int64_t* ends, int64_t count) {
    if (size() > max_bytes_) clear();
    parts_.clear();
    parts_before_end_.clear();
    new_.clear();
    const uint8_t* text = bytes;
    for (int64_t number = 0; number < count; ++number) {
      const uint8_t* end = bytes + ends[number];
      split(text, end);
      parts_before_end_.push_back(parts_.size());
      text = end;
    }
    return static_cast<int64_t>(new_.size());
  }

  // The bytes of the new parts, one after another, and the end of each.
  int64_t new_bytes() const {
    int64_t total = 0;
    for (const uint32_t word : new_) total += words_[word].length;
    return total;
  }
  void new_parts(uint8_t* bytes, int64_t* ends) const {
    int64_t end = 0;
    for (size_t number = 0; number < new_.size(); ++number) {
      const Word& word = words_[new_[number]];
      if (word.length <= kInside) {
        const uint64_t both[] = {word.first, word.second};
        std::memcpy(bytes + end, both, word.length);
      } else {
        std::memcpy(bytes + end, keys_.data() + word.key, word.length);
      }
      end += word.length;
      ends[number] = end;
    }
  }

  void learn(const uint32_t* ids, const int64_t* lengths) {
    for (size_t number = 0; number < new_.size(); ++number) {
      Word& word = words_[new_[number]];
      word.count = static_cast<uint32_t>(lengths[number]);
      if (word.count <= kIdsInside) {
        std::copy(ids, ids + word.count, word.ids);
      } else {
        word.ids_start = ids_.size();
        ids_.insert(ids_.end(), ids, ids + word.count);
      }
      ids += word.count;
    }
    new_.clear();
  }

  // Writes the number of ids of each text. Returns their sum.
  int64_t lengths(int64_t* lengths) const {
    int64_t total = 0;
    size_t part = 0;
    for (size_t number = 0; number < parts_before_end_.size(); ++number) {
      int64_t length = 0;
      for (; part < parts_before_end_[number]; ++part) length += words_[parts_[part]].count;
      lengths[number] = length;
      total += length;
    }
    return total;
  }

  void write(uint32_t* ids) const {
    for (const uint32_t part : parts_) {
      const Word& word = words_[part];
      const uint32_t* source = word.count <= kIdsInside ? word.ids : ids_.data() + word.ids_start;
      for (uint32_t id = 0; id < word.count; ++id) *ids++ = source[id];
    }
  }

  void clear() {
    keys_.clear();
    ids_.clear();
    words_.clear();
    parts_.clear();
    parts_before_end_.clear();
    new_.clear();
    slots_.assign(1 << 16, Slot{0, 0});
  }

 private:
  uint64_t size() const { return keys_.size() + 4 * ids_.size() + sizeof(Word) * words_.size() + sizeof(Slot) * slots_.size(); }

  void split(const uint8_t* text, const uint8_t* end) {
    const uint8_t* part = text;
    for (const uint8_t* at = text + 1; at < end; ++at) {
      if ((at[0] & 0xC0) == 0x80) continue;  // inside a character
      const bool ascii = (at[-1] | at[0]) < kOther;
      const int before = ascii ? at[-1] : class_before(text, at);
      const int after = ascii ? at[0] : class_after(at, end);
      if (adjacent_[before * kClasses + after]) continue;
      add_part(part, at);
      part = at;
    }
    if (part < end) add_part(part, end);
  }

  void add_part(const uint8_t* begin, const uint8_t* end) {
    const auto length = static_cast<uint64_t>(end - begin);
    const uint64_t first = first_bytes(eight_bytes(begin), length);
    const uint64_t second = length > 8 ? first_bytes(eight_bytes(begin + 8), length - 8) : 0;
    uint64_t hash = mixed(mixed(length, first), second);
    for (uint64_t at = kInside; at < length; at += 8) hash = mixed(hash, first_bytes(eight_bytes(begin + at), length - at));
    const uint64_t mask = slots_.size() - 1;
    const auto tag = static_cast<uint32_t>(hash);
    uint64_t place = tag & mask;
    for (; slots_[place].word; place = (place + 1) & mask) {
      if (slots_[place].hash != tag) continue;
      const Word& word = words_[slots_[place].word - 1];
      if (word.first != first || word.second != second || word.length != length) continue;
      if (length > kInside && std::memcmp(keys_.data() + word.key, begin, length) != 0) continue;
      parts_.push_back(slots_[place].word - 1);
      return;
    }
    const auto number = static_cast<uint32_t>(words_.size());
    Word word{first, second, keys_.size(), static_cast<uint32_t>(length), 0, {}};
    if (length > kInside) keys_.insert(keys_.end(), begin, end);
    words_.push_back(word);
    slots_[place] = Slot{tag, number + 1};
    new_.push_back(number);
    parts_.push_back(number);
    if (2 * words_.size() > slots_.size()) grow();
  }

  void grow() {
    std::vector<Slot> larger(2 * slots_.size(), Slot{0, 0});
    const uint64_t mask = larger.size() - 1;
    for (const Slot& slot : slots_) {
      if (!slot.word) continue;
      uint64_t place = slot.hash & mask;
      while (larger[place].word) place = (place + 1) & mask;
      larger[place] = slot;
    }
    slots_.swap(larger);
  }

  std::vector<uint8_t> adjacent_;
  uint64_t max_bytes_;
  std::vector<uint8_t> keys_;
  std::vector<uint32_t> ids_;
  std::vector<Word> words_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> parts_;       // indices into words_, in the order of the texts
  std::vector<size_t> parts_before_end_;  // for each text, the number of parts up to its end
  std::vector<uint32_t> new_;         // words whose ids are not known yet
};

}  // namespace
}  // namespace megatron_patch

#define EXPORTED extern "C" __attribute__((visibility("default")))

using megatron_patch::WordCache;

EXPORTED WordCache* word_cache_new(const uint8_t* adjacent, uint64_t max_bytes) {
  return new WordCache(adjacent, max_bytes);
}
EXPORTED void word_cache_delete(WordCache* cache) { delete cache; }
EXPORTED int64_t word_cache_scan(WordCache* cache, const uint8_t* bytes, const int64_t* ends, int64_t count) {
  return cache->scan(bytes, ends, count);
}
EXPORTED int64_t word_cache_new_bytes(const WordCache* cache) { return cache->new_bytes(); }
EXPORTED void word_cache_new_parts(const WordCache* cache, uint8_t* bytes, int64_t* ends) { cache->new_parts(bytes, ends); }
EXPORTED void word_cache_learn(WordCache* cache, const uint32_t* ids, const int64_t* lengths) { cache->learn(ids, lengths); }
EXPORTED int64_t word_cache_lengths(const WordCache* cache, int64_t* lengths) { return cache->lengths(lengths); }
EXPORTED void word_cache_write(const WordCache* cache, uint32_t* ids) { cache->write(ids); }
EXPORTED void word_cache_clear(WordCache* cache) { cache->clear(); }
