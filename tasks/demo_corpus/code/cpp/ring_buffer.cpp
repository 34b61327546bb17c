#include <array>
#include <cstddef>
#include <iostream>

template <typename T, std::size_t N>
class RingBuffer {
public:
    void push(const T& value) {
        data_[(start_ + size_) % N] = value;
        if (size_ < N) {
            ++size_;
        } else {
            start_ = (start_ + 1) % N;  // overwrite the oldest
        }
    }
    std::size_t size() const { return size_; }
    const T& operator[](std::size_t i) const { return data_[(start_ + i) % N]; }

private:
    std::array<T, N> data_{};
    std::size_t start_ = 0;
    std::size_t size_ = 0;
};

int main() {
    RingBuffer<int, 3> last;
    for (int i = 1; i <= 5; ++i) last.push(i);
    std::cout << last[0] << '\n';
}
