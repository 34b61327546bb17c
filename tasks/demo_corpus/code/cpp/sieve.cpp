#include <iostream>
#include <vector>

std::vector<int> primes_below(int limit) {
    std::vector<bool> crossed(limit, false);
    std::vector<int> primes;
    for (int n = 2; n < limit; ++n) {
        if (crossed[n]) {
            continue;
        }
        primes.push_back(n);
        for (long long m = 1LL * n * n; m < limit; m += n) {
            crossed[m] = true;
        }
    }
    return primes;
}

int main() {
    for (int p : primes_below(60)) {
        std::cout << p << ' ';
    }
    std::cout << '\n';
}
