final case class Account(owner: String, balance: BigDecimal) {
  def deposit(amount: BigDecimal): Account =
    copy(balance = balance + amount)

  def withdraw(amount: BigDecimal): Either[String, Account] =
    if (amount > balance) Left(s"$owner has only $balance")
    else Right(copy(balance = balance - amount))
}

object Bank {
  def transfer(from: Account, to: Account, amount: BigDecimal): Either[String, (Account, Account)] =
    for {
      _ <- if (amount > 0) Right(()) else Left("amount must be positive")
      payer <- from.withdraw(amount)
    } yield (payer, to.deposit(amount))
}
