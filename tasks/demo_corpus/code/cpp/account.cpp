#include <iostream>
#include <stdexcept>
#include <string>
#include <utility>

class Account {
public:
    explicit Account(std::string owner) : owner_(std::move(owner)) {}

    void deposit(long cents) { balance_ += cents; }

    void withdraw(long cents) {
        if (cents > balance_) {
            throw std::runtime_error(owner_ + " has too little money");
        }
        balance_ -= cents;
    }

private:
    std::string owner_;
    long balance_ = 0;
};

int main() {
    Account a("Mira");
    a.deposit(500);
    try {
        a.withdraw(900);
    } catch (const std::exception& e) {
        std::cerr << e.what() << '\n';
    }
}
