#include <chrono>
#include <cstdio>

class Stopwatch {
    using Clock = std::chrono::steady_clock;

public:
    Stopwatch() : begin_(Clock::now()) {}

    double milliseconds() const {
        const std::chrono::duration<double, std::milli> gone = Clock::now() - begin_;
        return gone.count();
    }

    void restart() { begin_ = Clock::now(); }

private:
    Clock::time_point begin_;
};

int main() {
    Stopwatch watch;
    double sum = 0;
    for (int i = 1; i < 1000000; ++i) sum += 1.0 / i;
    std::printf("%.4f in %.2f ms\n", sum, watch.milliseconds());
}
