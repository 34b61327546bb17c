import scala.annotation.tailrec

object Primes {
  /** Splits a number into its prime factors, smallest first. */
  def factors(number: Int): List[Int] = {
    @tailrec
    def loop(rest: Int, divisor: Int, found: List[Int]): List[Int] =
      if (rest < 2) found.reverse
      else if (divisor * divisor > rest) (rest :: found).reverse
      else if (rest % divisor == 0) loop(rest / divisor, divisor, divisor :: found)
      else loop(rest, divisor + 1, found)

    loop(number, 2, Nil)
  }

  def main(args: Array[String]): Unit =
    Seq(12, 97, 360).foreach(n => println(s"$n = ${factors(n).mkString(" x ")}"))
}
