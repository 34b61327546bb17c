object TextWrap {
  def wrap(text: String, width: Int): List[String] = {
    val words = text.split(' ').toList.filter(_.nonEmpty)
    words
      .foldLeft(List.empty[String]) {
        case (line :: done, word) if line.length + word.length < width =>
          s"$line $word" :: done
        case (lines, word) =>
          word :: lines
      }
      .reverse
  }

  def main(args: Array[String]): Unit = {
    val text = "After lunch we walked along the canal and counted the boats."
    wrap(text, 24).foreach(line => println("| " + line))
  }
}
