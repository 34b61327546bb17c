object WordCount {
  def count(text: String): Map[String, Int] =
    text.toLowerCase
      .split("\\W+")
      .filter(_.nonEmpty)
      .groupBy(identity)
      .map { case (word, all) => word -> all.length }

  def main(args: Array[String]): Unit = {
    val text = "The old clock in the hall is slow, but the new clock is fast."
    // Most frequent words first, then in alphabetical order.
    for ((word, n) <- count(text).toSeq.sortBy { case (w, c) => (-c, w) }) {
      println(s"$n $word")
    }
  }
}
