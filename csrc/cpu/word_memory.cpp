// The ids of words that a tokenizer has already encoded: a text is cut where no token reaches over, and only parts that are new are encoded.
//
// A plain C interface, called through ctypes, so that preprocessing needs neither torch nor a Python of one version. A call of `scan`
// finds the parts of some texts and those among them that are new, `learn` takes the ids of these, `write` gives the ids of all.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

namespace megatron_patch {
namespace {

// Where a text may be cut; data/preprocess/word_memory.py says for which tokenizers each holds.
enum class Cuts : int32_t {
  kBehindAscii = 0,       // in front of a space behind an ASCII letter or digit
  kBetweenAscii = 1,      // at a space between ASCII letters or digits; the space is left out
  kBetweenStrangers = 2,  // between characters that stand side by side in no piece of the vocabulary
};

bool is_ascii_word(uint8_t byte) { return (byte >= '0' && byte <= '9') || ((byte | 0x20) >= 'a' && (byte | 0x20) <= 'z'); }

static_assert(std::endian::native == std::endian::little, "words are compared eight bytes at a time, the first in the lowest");

// Classes of characters: ASCII, where ▁ (E2 96 81 in UTF-8) passes for a space, and all others.
constexpr int kOther = 128;
constexpr int kClasses = kOther + 1;

bool is_mark(const uint8_t* bytes) { return bytes[0] == 0xE2 && bytes[1] == 0x96 && bytes[2] == 0x81; }

int class_before(const uint8_t* begin, const uint8_t* at) {
  if (at[-1] < kOther) return at[-1];
  return at - begin >= 3 && is_mark(at - 3) ? ' ' : kOther;
}

int class_behind(const uint8_t* at, const uint8_t* end) {
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

// The next space, or `end`; reads up to 8 bytes behind `end`.
const uint8_t* next_space(const uint8_t* at, const uint8_t* end) {
  constexpr uint64_t kOnes = 0x0101010101010101u;
  for (; at < end; at += 8) {
    const uint64_t zero_at_space = eight_bytes(at) ^ (kOnes * ' ');
    const uint64_t found = (zero_at_space - kOnes) & ~zero_at_space & (kOnes << 7);
    if (found) {
      at += std::countr_zero(found) / 8;
      break;
    }
  }
  return at < end ? at : end;
}

uint64_t mixed(uint64_t hash, uint64_t eight) {
  hash = (hash ^ eight) * 0x9E3779B97F4A7C15u;
  return hash ^ (hash >> 32);
}

constexpr uint64_t kInside = 16;  // bytes of a key that stand in the word itself
constexpr uint64_t kIdsInside = 6;

// A cache line: what most words need to be compared and written.
struct alignas(64) Word {
  uint64_t first, second;  // the key's first bytes, and zeros
  uint64_t key;            // where a longer key stands as a whole
  uint32_t length, count;  // of the key in bytes, and ids
  union {
    uint32_t ids[kIdsInside];
    uint64_t place;  // of more ids than fit in here
  };
};

struct Slot {
  uint32_t hash, word;  // word: its number + 1; 0: free
};

class WordMemory {
 public:
  // `neighbours`: for kBetweenStrangers, which classes of characters stand side by side in a piece, kClasses x kClasses.
  WordMemory(Cuts cuts, const uint8_t* neighbours, uint64_t most_bytes) : cuts_(cuts), most_bytes_(most_bytes) {
    if (neighbours != nullptr) neighbours_.assign(neighbours, neighbours + kClasses * kClasses);
    forget();
  }

  // Cuts texts, which stand one behind another and end at `ends`; 8 bytes behind the last must be readable. Returns the number of new parts.
  int64_t scan(const uint8_t* bytes, const int64_t* ends, int64_t count) {
    if (size() > most_bytes_) forget();
    parts_.clear();
    parts_behind_.clear();
    new_.clear();
    const uint8_t* text = bytes;
    for (int64_t number = 0; number < count; ++number) {
      const uint8_t* end = bytes + ends[number];
      cuts_ == Cuts::kBetweenStrangers ? cut_between_strangers(text, end) : cut_at_spaces(text, end);
      parts_behind_.push_back(parts_.size());
      text = end;
    }
    return static_cast<int64_t>(new_.size());
  }

  // The bytes of the new parts, one behind another, and where each ends.
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
        word.place = ids_.size();
        ids_.insert(ids_.end(), ids, ids + word.count);
      }
      ids += word.count;
    }
    new_.clear();
  }

  // Ids in each text. Returns those in all.
  int64_t lengths(int64_t* lengths) const {
    int64_t total = 0;
    size_t part = 0;
    for (size_t number = 0; number < parts_behind_.size(); ++number) {
      int64_t length = 0;
      for (; part < parts_behind_[number]; ++part) length += words_[parts_[part]].count;
      lengths[number] = length;
      total += length;
    }
    return total;
  }

  void write(uint32_t* ids) const {
    for (const uint32_t part : parts_) {
      const Word& word = words_[part];
      const uint32_t* source = word.count <= kIdsInside ? word.ids : ids_.data() + word.place;
      for (uint32_t id = 0; id < word.count; ++id) *ids++ = source[id];
    }
  }

  void forget() {
    keys_.clear();
    ids_.clear();
    words_.clear();
    parts_.clear();
    parts_behind_.clear();
    new_.clear();
    slots_.assign(1 << 16, Slot{0, 0});
  }

 private:
  uint64_t size() const { return keys_.size() + 4 * ids_.size() + sizeof(Word) * words_.size() + sizeof(Slot) * slots_.size(); }

  void cut_between_strangers(const uint8_t* text, const uint8_t* end) {
    const uint8_t* part = text;
    for (const uint8_t* at = text + 1; at < end; ++at) {
      if ((at[0] & 0xC0) == 0x80) continue;  // inside a character
      const bool ascii = (at[-1] | at[0]) < kOther;
      const int before = ascii ? at[-1] : class_before(text, at);
      const int behind = ascii ? at[0] : class_behind(at, end);
      if (neighbours_[before * kClasses + behind]) continue;
      say(part, at);
      part = at;
    }
    if (part < end) say(part, end);
  }

  void cut_at_spaces(const uint8_t* text, const uint8_t* end) {
    const uint8_t* part = text;
    for (const uint8_t* at = next_space(text, end); at < end; at = next_space(at + 1, end)) {
      if (at == text || !is_cut(at, end)) continue;
      say(part, at);
      part = cuts_ == Cuts::kBehindAscii ? at : at + 1;
    }
    if (part < end) say(part, end);
  }

  bool is_cut(const uint8_t* space, const uint8_t* end) const {
    if (!is_ascii_word(space[-1])) return false;
    return cuts_ == Cuts::kBehindAscii || (space + 1 < end && is_ascii_word(space[1]));
  }

  void say(const uint8_t* begin, const uint8_t* end) {
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

  Cuts cuts_;
  std::vector<uint8_t> neighbours_;
  uint64_t most_bytes_;
  std::vector<uint8_t> keys_;
  std::vector<uint32_t> ids_;
  std::vector<Word> words_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> parts_;       // the words of the texts at hand
  std::vector<size_t> parts_behind_;  // for each text, its last part + 1
  std::vector<uint32_t> new_;
};

}  // namespace
}  // namespace megatron_patch

#define EXPORTED extern "C" __attribute__((visibility("default")))

using megatron_patch::WordMemory;

EXPORTED WordMemory* word_memory_new(int32_t cuts, const uint8_t* neighbours, uint64_t most_bytes) {
  return new WordMemory(static_cast<megatron_patch::Cuts>(cuts), neighbours, most_bytes);
}
EXPORTED void word_memory_delete(WordMemory* memory) { delete memory; }
EXPORTED int64_t word_memory_scan(WordMemory* memory, const uint8_t* bytes, const int64_t* ends, int64_t count) {
  return memory->scan(bytes, ends, count);
}
EXPORTED int64_t word_memory_new_bytes(const WordMemory* memory) { return memory->new_bytes(); }
EXPORTED void word_memory_new_parts(const WordMemory* memory, uint8_t* bytes, int64_t* ends) { memory->new_parts(bytes, ends); }
EXPORTED void word_memory_learn(WordMemory* memory, const uint32_t* ids, const int64_t* lengths) { memory->learn(ids, lengths); }
EXPORTED int64_t word_memory_lengths(const WordMemory* memory, int64_t* lengths) { return memory->lengths(lengths); }
EXPORTED void word_memory_write(const WordMemory* memory, uint32_t* ids) { memory->write(ids); }
EXPORTED void word_memory_forget(WordMemory* memory) { memory->forget(); }
